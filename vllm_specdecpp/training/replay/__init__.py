# SPDX-License-Identifier: Apache-2.0
"""Replaying recorded rounds under any stop rule, to choose one."""
