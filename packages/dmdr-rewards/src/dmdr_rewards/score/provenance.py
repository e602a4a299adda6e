"""How the scores are made: columns of the output, and the reason for a later run to refuse to continue it."""

import json
import os
import warnings
from collections.abc import Sequence
from typing import Any

from dmdr_rewards.base.errors import naming
from dmdr_rewards.networks.known_files import compared
from dmdr_rewards.score.reward_arguments import RewardArgument

# Options that say how patiently an endpoint is asked. They do not change a score, so a run may continue with others.
_PATIENCE = {"timeout", "retries", "backoff", "concurrency", "on_failure", "api_key_env"}


def provenance_of(rewards: Sequence[RewardArgument], dtype: str) -> dict[str, str | None]:
    """Column -> text, as far as it is known before the rewards are loaded.

    A file is recorded by its hash, so it may be moved. A checkpoint that is not a file is the name of a model behind
    an endpoint, and is recorded as it is. Raises UserError for a path that cannot be hashed.
    """
    columns: dict[str, str | None] = {"dtype": dtype}
    for reward in rewards:
        options = {key: value for key, value in reward.options.items() if key not in _PATIENCE}
        if options.get("preprocess") == "reference":
            del options["preprocess"]
        with naming(f"--reward {reward.name}"):
            hashes = {key: _hash(value) for key, value in {"checkpoint": reward.checkpoint, **options}.items()}
        if reward.kind is not None:
            columns[f"{reward.name}.reward"] = reward.kind
        columns[f"{reward.name}.sha256"] = digest = hashes.pop("checkpoint")
        columns[f"{reward.name}.official"] = None if digest is None else _compared(reward, digest)
        if reward.checkpoint is not None and columns[f"{reward.name}.sha256"] is None:
            options["checkpoint"] = reward.checkpoint
        options.update({key: value for key, value in hashes.items() if value is not None})
        if options:
            columns[f"{reward.name}.options"] = json.dumps(options, sort_keys=True)
    return columns


def _compared(reward: RewardArgument, digest: str) -> str:
    said = compared(reward.reward, digest)
    if said.startswith("no,"):
        warnings.warn(f"--reward {reward.name}: {reward.checkpoint} is no official file: {said}", stacklevel=3)
    return said


def _hash(value: Any) -> str | None:
    if not (isinstance(value, str) and value and os.path.exists(value)):  # False for a long text, without an error
        return None
    from dmdr_rewards.networks.checkpoint_files import sha256

    return sha256(value)
