"""Constants of the image interface."""

from __future__ import annotations

IMAGE_TOKEN = "<IMAGE_TOKEN>"
"""Marks the place of an image in a prompt's text."""
