# SPDX-License-Identifier: Apache-2.0
"""The command ``fit`` with real engines and tiny models: killed once, it goes on, and ends with a verdict."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.recordings import wait_until
