# SPDX-License-Identifier: Apache-2.0
"""Training a head, and calibrating its score."""
