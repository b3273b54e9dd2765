# SPDX-License-Identifier: Apache-2.0
"""Recording rounds from the traffic, as training data."""
