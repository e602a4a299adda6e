"""What a run is made from: fingerprints of the files that its recipe names. They may move, and may not change."""

from dmdr_models.describe import content_fingerprint, network_fingerprint

from dmdr_train.recipe import Recipe, RewardObjective


def fingerprints(settings: Recipe) -> dict[str, str]:
    """Of every input that the training's numbers depend on, by its key. Imports no torch.

    A hub name stands for itself.

    Raises:
        ValueError, OSError: `model.path` holds no network of its family.
    """
    model, data = settings.model, settings.data
    paths = {"model.generator": model.generator, "model.vae": model.vae, "data.prompts": data.prompts}
    paths["data.pairs"] = data.pairs
    for i, objective in enumerate(settings.objectives):
        if isinstance(objective, RewardObjective):
            paths[f"objectives.{i}.reward.checkpoint"] = objective.reward.checkpoint
    found = {key: content_fingerprint(path) for key, path in paths.items() if path is not None}
    return {"model.path": network_fingerprint(model.family, model.path), **found}
