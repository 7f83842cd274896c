"""Artifacts on the Hugging Face Hub: push, pull, and where things went."""

from __future__ import annotations

from prufed_cli.hub.pulling import PullResult, fetch_base, pull
from prufed_cli.hub.pushing import PushResult, push

__all__ = ["PullResult", "PushResult", "fetch_base", "pull", "push"]
