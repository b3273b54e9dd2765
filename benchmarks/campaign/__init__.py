# SPDX-License-Identifier: Apache-2.0
"""Everything that a user could pick, side by side in one interleaved run, from one YAML file."""
