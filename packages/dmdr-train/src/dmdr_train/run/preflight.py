"""Checks of a recipe against files, packages and processes, before torch is imported or a weight is read."""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr_models import registry
from dmdr_models.base.errors import SizeError
from dmdr_models.folder.adapter_files import adapter_ranks, check_adapter
from dmdr_models.folder.checks import check_weights
from dmdr_models.folder.contents import Description, check_vae, describe
from dmdr_models.folder.lora_targets import check_targets
from dmdr_models.folder.quantisation import LIBRARIES

from dmdr_train.base.errors import UserError, naming
from dmdr_train.base.folders import check_writable
from dmdr_train.checkpoint.compatibility import check_moments, check_same_base
from dmdr_train.checkpoint.find import checkpoints_in, newest
from dmdr_train.checkpoint.manifest import RECIPE
from dmdr_train.data.embedding_cache import check_embeddings
from dmdr_train.data.pairs import check_pairs, side_of_pairs
from dmdr_train.data.prompt_files import check_prompts
from dmdr_train.data.real_pictures import check_pictures
from dmdr_train.distributed.run_lock import check_free
from dmdr_train.evaluation.check import check_evaluation as check_files_of_evaluation
from dmdr_train.recipe.objective_kinds import needs
from dmdr_train.recipe.quantised_base import check_quantised_folder
from dmdr_train.recipe.schema import ObjectiveSection, Recipe, Reward
from dmdr_train.tracking.metrics_file import METRICS
from dmdr_train.tracking.registry import chosen

if TYPE_CHECKING:
    from dmdr_rewards import RewardInfo


def check(settings: Recipe, world: int, dry_run: bool = False) -> None:
    """Check a recipe against the files it names and the processes it runs on.

    Raises:
        UserError: for the first mistake.
    """
    check_batch(settings, world)
    check_memory(settings)
    found = check_model(settings)
    check_data(settings, found)
    check_pairs(settings)
    check_pictures(settings)
    check_compared(settings)
    for i, objective in enumerate(settings.objectives):
        for key, path in objective.files.items():
            file(f"objectives.{i}.{key}", path)
        if "reward" in needs(objective):
            check_objective(f"objectives.{i}.reward", objective, found)
    for i, reward in enumerate(settings.watch.rewards):
        check_reward(f"watch.rewards.{i}", reward, found)
    check_evaluation(settings, found)
    if settings.run.init_from and not goes_on(settings):
        folder("run.init_from", settings.run.init_from)
        source = newest("run.init_from", settings.run.init_from)
        check_same_base(settings, source)
        if settings.run.init_moments:
            check_moments(settings, source)
    for tracker in chosen(settings.tracking):
        tracker.check()
    if not dry_run:
        with naming("run.output"):
            check_output(settings)


def goes_on(settings: Recipe) -> bool:
    """Whether the run resumes from a checkpoint."""
    run = settings.run
    return run.resume not in ("never", "auto") or (
        run.resume == "auto" and bool(checkpoints_in(Path(run.output) / "checkpoints"))
    )


def check_batch(settings: Recipe, world: int) -> None:
    """Check that the processes and their micro-batches share the global batch equally, in whole groups."""
    optim, group = settings.optim, settings.rollout.group_size
    unit = world * optim.accumulation * group
    if optim.batch_size % unit:
        groups = f" x rollout.group_size {group}" if group > 1 else ""
        raise UserError(
            "optim.batch_size",
            f"{optim.batch_size} cannot be split over {world} processes x optim.accumulation {optim.accumulation}"
            f"{groups}; use a multiple of {unit}, such as {-(-optim.batch_size // unit) * unit}",
        )


def check_model(settings: Recipe) -> Description | None:
    """Check the section `model` and return what its folder is; None for a hub name, which only loading can check."""
    model = settings.model
    found = read_description(settings)
    check_options(settings)
    if model.vae is not None:
        with naming("model.vae"):
            check_vae(registry.find(model.family), model.vae)
    if model.generator is not None:
        with naming("model.generator"):
            check_weights(registry.find(model.family), model.generator, None if found is None else found.layers)
    check_loras(settings, None if found is None else found.layers)
    if found is None:
        return None
    if found.quantised is not None:
        with naming("model.path"):
            check_quantised_folder(settings, found.quantised)
    for key, lora in (("generator_lora", model.generator_lora), ("fake_score_lora", model.fake_score_lora)):
        if lora is not None:
            with naming(f"model.{key}.targets"):
                check_targets(lora.targets or [], found.layers)
    return found


def check_loras(settings: Recipe, layers: Sequence[str] | None) -> None:
    """Check the LoRAs that the teacher has and that the generator's continues."""
    model = settings.model
    part = registry.find(model.family).network_part
    for i, lora in enumerate(model.teacher_loras):
        with naming(f"model.teacher_loras.{i}.path"):
            check_adapter(lora.path, layers, part)
    own = model.generator_lora
    if own is not None and own.start is not None and not goes_on(settings):
        with naming("model.generator_lora.start"):
            check_adapter(own.start, layers, part)
            ranks = adapter_ranks(own.start)
        if ranks - {own.rank}:
            named = " and ".join(map(str, sorted(ranks)))
            raise UserError("model.generator_lora.rank", f"{own.rank} is not that of {own.start}; set it to {named}")


def check_options(settings: Recipe) -> None:
    """Check that the family has what the recipe sets: a VAE, and a choice of the length of texts."""
    model, memory = settings.model, settings.memory
    layout = registry.find(model.family)
    if model.max_tokens is not None and layout.max_tokens is None:
        raise UserError("model.max_tokens", f"the family {model.family} leaves no choice; set it to null")
    if "vae" in layout.parts:
        return
    for key, on in (
        ("model.vae", model.vae is not None),
        ("memory.channels_last", memory.channels_last),
        ("memory.vae_tiling", memory.vae_tiling),
        ("memory.vae_slicing", memory.vae_slicing),
        ("memory.gradient_checkpointing", "vae" in memory.gradient_checkpointing),
    ):
        if on:
            raise UserError(key, f"the family {model.family} has no VAE; leave it out")


def check_data(settings: Recipe, found: Description | None) -> None:
    """Check that the section `data` has what the model takes: class labels, or texts."""
    data = settings.data
    check_prompts(data)
    check_embeddings(settings)
    if found is None:
        return
    if found.num_classes is None:
        if data.prompts is None:
            raise UserError("data.prompts", f"is null and family {settings.model.family} takes texts; give a file")
        return
    for key, value in (("data.prompts", data.prompts), ("tracking.samples.prompts", settings.tracking.samples.prompts)):
        if value is not None:
            raise UserError(key, f"family {settings.model.family} takes class labels; remove it, and use data.classes")
    if data.classes != "all":
        if not data.classes:
            raise UserError("data.classes", "is empty; give class labels, or all")
        for label in data.classes:
            if not 0 <= label < found.num_classes:
                raise UserError(
                    "data.classes", f"label {label} is out of range; valid are 0 to {found.num_classes - 1}"
                )


def check_compared(settings: Recipe) -> None:
    """Check that the pictures of pairs are not too small for an objective that compares them."""
    pairs, crop, scale = settings.data.pairs, settings.memory.reward_crop, settings.memory.reward_scale
    for i, objective in enumerate(settings.objectives):
        least = objective.smallest_picture
        if pairs is None or least == 1:
            continue
        side = crop or side_of_pairs(pairs)
        needs = f"is less than the {least} pixels that objectives.{i}.distance needs"
        if side >= least > side * scale:
            raise UserError("memory.reward_scale", f"{scale} of {side} {needs}; use {least / side:g} or more")
        if crop and side < least:
            raise UserError("memory.reward_crop", f"{crop} {needs}; use {least} or more")
        if side < least:
            raise UserError("model.resolution", f"{side} {needs}; use the distance latent_mse")


def read_description(settings: Recipe) -> Description | None:
    """Describe the model's folder without reading its weights; None for a hub name.

    Raises:
        UserError: the folder has another model, or the model cannot draw one of the recipe's sizes.
    """
    model = settings.model
    elsewhere = model.vae is not None, settings.data.embeddings is not None
    try:
        sizes = [size.shape for size in model.sizes]
        return describe(registry.find(model.family), model.path, *elsewhere, sizes, quantised=True)
    except SizeError as error:
        raise UserError("model.resolution", str(error)) from None
    except (OSError, ValueError) as error:
        raise UserError("model.path", f"{error}; give a folder that holds a {model.family} model") from None


def check_objective(key: str, objective: ObjectiveSection, found: Description | None) -> None:
    """Check that the reward of an objective can be used, and has what the objective needs."""
    section: Any = objective  # the section of an objective that needs a reward has one
    info, needed = check_reward(key, section.reward, found), needs(objective)
    if "reward_gradient" in needed and not info.differentiable:
        raise UserError(f"{key}.name", f"{info.name} has no gradient, which {objective.kind} needs; use another")
    if "reward_of_texts" in needed and info.prompt != "text":
        raise UserError(f"{key}.name", f"{info.name} reads no text, which {objective.kind} needs; use another")


def check_reward(key: str, reward: Reward, found: Description | None) -> "RewardInfo":
    """Check that the reward exists and reads what the model is conditioned on: class labels, or texts."""
    import dmdr_rewards  # does not import torch before `create`

    try:
        info = dmdr_rewards.describe(reward.name)
    except ValueError as error:
        raise UserError(f"{key}.name", str(error)) from None
    if reward.checkpoint is not None and not info.endpoint and not os.path.exists(reward.checkpoint):
        raise UserError(f"{key}.checkpoint", f"no file or folder {reward.checkpoint!r}; give the reward's weights")
    if reward.checkpoint is None and info.checkpoint != "none":
        raise UserError(f"{key}.checkpoint", f"is null and {reward.name} needs its weights; give {info.checkpoint}")
    if found is not None and info.prompt != "none" and (info.prompt == "text") != (found.num_classes is None):
        takes = "texts" if found.num_classes is None else "class labels"
        raise UserError(f"{key}.name", f"{reward.name} does not go with a model that takes {takes}; use another")
    return info


def check_memory(settings: Recipe) -> None:
    """Check that the settings that save memory have an effect, and the packages that they need."""
    memory, optim = settings.memory, settings.optim
    if optim.eight_bit:
        installed("optim.eight_bit", "bitsandbytes", "eight-bit")
    if memory.quantize is not None:
        installed("memory.quantize", LIBRARIES[memory.quantize], LIBRARIES[memory.quantize])
    if memory.offload_optimizer and optim.zero_stage == 0:
        raise UserError("memory.offload_optimizer", "true needs optim.zero_stage 1, 2 or 3; set one, or use false")
    if memory.compile:
        check_compiler(settings.run.device)
    if memory.offloaded_adam == "deepspeed":
        check_extensions("memory.offloaded_adam", "torch")
    if memory.offload_text_encoders and (settings.data.prompts is None or settings.data.embeddings is not None):
        raise UserError("memory.offload_text_encoders", "true has no effect without text encoders; set it to false")


def check_compiler(device: str) -> None:
    """Check what torch.compile runs: a compiler with Python's headers, and on a GPU Triton."""
    key = "memory.compile"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError(key, "triton is not installed; install the torch that brings it, or use false")
    compilers = [os.environ.get("CXX", "g++")] if device == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    check_building(key, compilers, "false")


def check_extensions(key: str, otherwise: str) -> None:
    """Check what torch compiles an extension in C++ with: ninja, and a compiler with Python's headers."""
    if shutil.which("ninja") is None:
        raise UserError(key, f"there is no ninja, which compiles it; pip install ninja, or use {otherwise}")
    check_building(key, [os.environ.get("CXX", "c++")], otherwise)


def check_building(key: str, compilers: Sequence[str], otherwise: str) -> None:
    """Check that there is one of these compilers, and Python's headers."""
    if not any(shutil.which(compiler) for compiler in compilers):
        raise UserError(key, f"there is no compiler {' or '.join(compilers)}; install one, or use {otherwise}")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        fix = f"install Python's headers, such as python3-dev, or use {otherwise}"
        raise UserError(key, f"there is no {headers}; {fix}")


def installed(key: str, package: str, extra: str) -> None:
    """Check that an optional package is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(key, f"{package} is not installed; pip install dmdr-train[{extra}], or leave it out")


def check_evaluation(settings: Recipe, found: Description | None) -> None:
    """Check the files of the evaluation, and that its rewards can be used."""
    check_files_of_evaluation(settings, found)
    evaluation = settings.tracking.evaluation
    if evaluation is None:
        return
    if isinstance(evaluation.rewards, list):
        for i, reward in enumerate(evaluation.rewards):
            check_reward(f"tracking.evaluation.rewards.{i}", reward, found)
    if evaluation.features is not None:  # its tower reads pictures alone, whatever the model is conditioned on
        check_features("tracking.evaluation.features", evaluation.features)


def check_features(key: str, features: Reward) -> None:
    """Check that the network of the features is one of `dmdr-score compare`, and that its weights are there."""
    from dmdr_rewards.base.errors import MissingError
    from dmdr_rewards.compare.feature_names import check_features as check

    try:
        check(features.name, features.checkpoint)
    except MissingError as error:
        raise UserError(f"{key}.checkpoint", f"{error}; give the network's weights") from None
    except ValueError as error:
        raise UserError(f"{key}.name" if features.checkpoint else f"{key}.checkpoint", str(error)) from None


def folder(key: str, path: str) -> None:
    """Check that a folder exists."""
    if not os.path.isdir(path):
        raise UserError(key, f"no folder {path!r}; give one that exists")


def file(key: str, path: str) -> None:
    """Check that a file exists."""
    if not os.path.isfile(path):
        raise UserError(key, f"no file {path!r}; give one that exists")


def check_output(settings: Recipe) -> None:
    """Check that the output folder can be written, and has no other run than the one to resume."""
    output, resume = Path(settings.run.output), settings.run.resume
    holds_a_run, has_student = (output / RECIPE).exists(), (output / "student").exists()
    holds_more = has_student or (output / METRICS).exists() or bool(checkpoints_in(output / "checkpoints"))
    if resume == "never" and (holds_a_run or holds_more):
        fix = "give another folder, or run.resume=auto to go on with it"
        raise UserError("run.output", f"{output} already holds a run; {fix}")
    if resume == "auto" and not goes_on(settings) and (has_student or (holds_more and not holds_a_run)):
        lost = f"{output} holds what a run leaves, but no checkpoint of it to go on from"
        raise UserError("run.output", f"{lost}; put its checkpoints back, or give another folder")
    if resume not in ("never", "auto"):
        newest("run.resume", resume)
        inside = Path(resume).resolve().is_relative_to(output.resolve())
        if (holds_a_run or holds_more) and not inside:
            raise UserError("run.output", f"{output} already holds another run than {resume}; give another folder")
    check_writable("run.output", output)
    for part in (output / "checkpoints", output / "samples"):
        if os.path.lexists(part) and not part.is_dir():  # a link to a disk that is not mounted
            raise UserError("run.output", f"{part} is no folder; remove it, or give another folder")
    check_free(output)
