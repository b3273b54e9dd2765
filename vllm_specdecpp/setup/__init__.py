# SPDX-License-Identifier: Apache-2.0
"""What only a machine without a hub or a GPU needs: vLLM's CPU build and models from packages."""
