# SPDX-License-Identifier: Apache-2.0
"""What draft passes and verifications cost: curves, the cost model, and their measurement."""
