"""Fingerprints of a run's inputs, the files that its recipe names. Inputs may move, but they must not change."""

import hashlib
import os

from dmdr_models import registry
from dmdr_models.folder.fingerprints import content_fingerprint, network_fingerprint, text_fingerprint

from dmdr_train.base.errors import naming
from dmdr_train.data.embedding_cache import cache_folder
from dmdr_train.recipe.schema import DRAWN, Evaluation, Recipe


def fingerprints(settings: Recipe) -> dict[str, str]:
    """Return the fingerprint of every input that the training's numbers depend on, by recipe key. Imports no torch.

    A hub name is its own fingerprint. The key `model.path` is for the network and its noise schedule; the key
    `data.embeddings` is for the text encoders, whether they run during the training or have filled a cache.

    Raises:
        UserError: an input cannot be read.
    """
    model, data = settings.model, settings.data
    paths = {"model.generator": model.generator, "data.prompts": data.prompts}
    paths |= {"data.pairs": data.pairs, "data.pictures": data.pictures}
    paths["model.vae"] = model.vae or os.path.join(model.path, "vae")
    paths |= {f"model.teacher_loras.{i}.path": lora.path for i, lora in enumerate(model.teacher_loras)}
    if evaluation := settings.tracking.evaluation:
        paths |= evaluation_inputs(evaluation)
    trained = settings.needing("reward")
    for i, (name, objective) in enumerate(zip(settings.names, settings.objectives, strict=True)):
        paths |= {f"objectives.{i}.{key}": path for key, path in objective.files.items()}
        if name in trained:
            paths[f"objectives.{i}.reward.checkpoint"] = trained[name].reward.checkpoint
    found = {}
    for key, path in paths.items():
        if path is not None:
            with naming(key):
                found[key] = content_fingerprint(path)
    with naming("model.path"):
        layout = registry.find(model.family)
        parts, noise = [network_fingerprint(layout, model.path)], os.path.join(model.path, "scheduler")
        if os.path.isdir(noise):
            parts.append(content_fingerprint(noise))
        found["model.path"] = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        if data.prompts is not None and data.embeddings is None:
            found["data.embeddings"] = text_fingerprint(layout, model.path, model.max_tokens)
    if data.embeddings is not None:
        found["data.embeddings"] = str(cache_folder("data.embeddings", data.embeddings).manifest().get("text_encoders"))
    return found


def evaluation_inputs(evaluation: Evaluation) -> dict[str, str | None]:
    """The files and folders that an evaluation reads, by recipe key."""
    key = "tracking.evaluation"
    paths = {f"{key}.classifier": evaluation.classifier}
    if evaluation.reference not in DRAWN:
        paths[f"{key}.reference"] = evaluation.reference
    if evaluation.features is not None:
        paths[f"{key}.features.checkpoint"] = evaluation.features.checkpoint
    rewards = evaluation.rewards if isinstance(evaluation.rewards, list) else []
    paths |= {f"{key}.rewards.{i}.checkpoint": reward.checkpoint for i, reward in enumerate(rewards)}
    return paths | {f"{key}.prompt_files.{i}": path for i, path in enumerate(evaluation.prompt_files)}
