# SPDX-License-Identifier: Apache-2.0
"""The rules without models: requests and costs are given."""
