"""The most that input from outside may ask for.

docs/security.md lists every limit; a test compares the two.
"""

from __future__ import annotations
