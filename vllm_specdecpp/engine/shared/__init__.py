# SPDX-License-Identifier: Apache-2.0
"""What the drafters of both model runners share."""
