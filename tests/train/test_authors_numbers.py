"""The shipped recipes hold the numbers of the DMDR authors' runs.

Each row names its source, a section of the project's description of the method and a line there. Section 8 lists the
recipes of the authors' trainers; section 8b lists what else their runs depend on: start values of LoRA, global batches,
the rates of stage two, what is scored relatively, and the text that HPS reads. Section 4 is distribution matching.
"""

import re
from importlib.resources import files
from typing import Any

import pytest
from dmdr_models.sd3.family import SD3
from dmdr_models.sd3.layout import LAYOUT
from dmdr_models.sdxl.family import SDXL
from dmdr_models.sit.family import SiT
from dmdr_train.recipe.load import from_yaml, load_recipe
from dmdr_train.recipe.schema import Recipe

MODELS = ("sd3-medium", "sd35-large", "sdxl-1step", "sit-xl-2")
GPUS = 24  # of the text-to-image runs, by their READMEs
OFF = None

# A line of section 8 or 8b, the recipe's key, and its value for each of MODELS.
BOTH_STAGES: list[tuple[str, str, Any, Any, Any, Any]] = [
    ("8, steps of the student", "rollout.steps", 4, 4, 1, 1),
    ("8, resolution (null: the model's own)", "model.resolution", 512, 1024, None, None),
    ("8, shift", "rollout.shift", 3, 5, 1, 1),
    ("8, rollout", "rollout.mode", "ode", "ode", "sde", "sde"),
    ("8, generator weights", "model.generator_lora.rank", 64, 64, OFF, OFF),
    ("8, generator weights", "model.generator_lora.alpha", 128, 128, OFF, OFF),
    ("8, guidance LoRA", "model.fake_score_lora.rank", 32, 32, 32, 32),
    ("8, guidance LoRA", "model.fake_score_lora.alpha", 32, 32, 32, 32),
    ("8, LoRA targets (null: the family's)", "model.fake_score_lora.targets", None, None, None, ["to_q", "to_v"]),
    ("8, LoRA targets (null: the family's)", "model.generator_lora.targets", None, None, OFF, OFF),
    ("8b, start values", "model.generator_lora.init", "gaussian", "gaussian", OFF, OFF),
    ("8b, start values", "model.fake_score_lora.init", "gaussian", "gaussian", "gaussian", "output_gaussian"),
    ("8, s_f", "guidance.fake_scale", 2.0, 2.0, 2.0, 2.0),
    ("8, teacher CFG (1: none)", "guidance.cfg", 7, 4, 7, 1),
    ("8, precision", "optim.precision", "bf16", "bf16", "fp16", "fp16"),
    ("8, ZeRO", "optim.zero_stage", 2, 2, 2, 2),
    ("8, optimiser: 8-bit in the text-to-image recipes", "optim.eight_bit", True, True, True, False),
    *(
        (f"8, optimiser of the {network}", f"optim.{network}.{key}", *(4 * [value]))
        for network, decay in (("generator", 0.01), ("fake_score", 0.0))
        for key, value in (("betas", (0.9, 0.999)), ("weight_decay", decay), ("schedule", "constant"), ("warmup", 0))
    ),
    ("8, gradient clip", "optim.clip", 1.0, 1.0, 1.0, 1.0),
    ("8, seed", "run.seed", 30, 30, 30, 30),
    ("8, no EMA", "optim.ema", OFF, OFF, OFF, OFF),
    ("8, SDXL decodes with the tiny VAE", "model.vae", None, None, "models/taesdxl", "stabilityai/sd-vae-ft-ema"),
    ("8, max 128 T5 tokens (null: the family's)", "model.max_tokens", None, None, None, None),
    ("8b, SDXL's unconditional", "guidance.unconditional", *(["model"] * 2), "empty_text", "model"),
    ("4, updates of the fake score", "guidance.ratio", 5, 5, 5, 5),
    ("4, CFG jitter", "guidance.cfg_jitter", 0.5, 0.5, 0.5, 0.0),
]
COLD_START: list[tuple[str, str, Any, Any, Any, Any]] = [
    ("8, s_r0", "guidance.dynamics.teacher_scale", 0.5, 0.5, OFF, 0.75),
    ("8, K", "guidance.dynamics.steps", 2000, 2000, OFF, 10000),
    ("8, renoise a0", "guidance.dynamics.renoise.alpha", 4, 4, OFF, 4),
    ("8, renoise b0", "guidance.dynamics.renoise.beta", 1.5, 1.5, OFF, 1.5),
    ("8, cold start: steps", "run.steps", 2000, 2000, 3000, 20000),
    ("8, cold start: lr gen", "optim.generator.lr", 1e-6, 1e-6, 1e-7, 2e-5),
    ("8, cold start: lr fake", "optim.fake_score.lr", 5e-7, 2e-8, 1e-7, 2e-5),
    ("8 and 8b, cold start: batch", "optim.batch_size", 8 * GPUS, 4 * GPUS, 8 * GPUS, 64 * 8),
    ("8b, global batches on eight GPUs, in one part where it is faster", "optim.accumulation", 1, 3, 3, 1),
    ("8, initial weights", "run.init_from", None, None, "runs/sdxl-regression", None),
]
STAGE_TWO: list[tuple[str, str, Any, Any, Any, Any]] = [
    ("8, K: both dynamics have ended", "guidance.dynamics", OFF, OFF, OFF, OFF),
    ("8, ReFL: lr gen", "optim.generator.lr", 5e-7, 1e-7, 5e-8, 1e-5),
    ("8, ReFL: lr fake", "optim.fake_score.lr", 2e-7, 5e-9, 5e-8, 1e-5),
    ("8 and 8b, ReFL: batch; SiT's at the paper's commit", "optim.batch_size", 4 * GPUS, 2 * GPUS, 4 * GPUS, 256),
    ("8b, global batches on eight GPUs, in one part where it is faster", "optim.accumulation", 1, 3, 1, 1),
    ("8, initial weights", "run.init_from", *(f"runs/{model}-cold-start" for model in MODELS)),
]
REFL_STEPS = ("8, ReFL: steps", "run.steps", 2000, 1000, 1000, 2000)
SRPO_STEPS = ("8, SRPO: steps, of SD3.5-Large 200 to 300", "run.steps", 300, 300, None, None)
STAGES = {
    "cold-start": [*BOTH_STAGES, *COLD_START],
    "refl": [*BOTH_STAGES, *STAGE_TWO, REFL_STEPS],
    "srpo": [*BOTH_STAGES, *STAGE_TWO, SRPO_STEPS],
}
RECIPES = [
    (model, stage)
    for stage in STAGES
    for model in MODELS
    if not (stage == "srpo" and model in ("sdxl-1step", "sit-xl-2"))
]

# 8, ReFL and SRPO: kind, reward, weight, margin, and what the reward reads. 8b: HPS alone is relative in SRPO, and the
# text has no comma.
REALISTIC = "Realistic photo {prompt}"
OBJECTIVES: dict[str, list[tuple[str, str, float, float, str]]] = {
    "sd3-medium-refl": [("refl", "dfn-clip", 0.3, 0.7, "{prompt}"), ("refl", "hpsv2.1", 0.3, 0.7, REALISTIC)],
    "sd35-large-refl": [("refl", "dfn-clip", 0.1, 0.7, "{prompt}"), ("refl", "hpsv2.1", 0.1, 0.7, REALISTIC)],
    "sdxl-1step-refl": [("refl", "dfn-clip", 0.3, 0.7, "{prompt}"), ("refl", "hpsv2.1", 0.3, 0.7, REALISTIC)],
    "sit-xl-2-refl": [("refl", "dinov2", 0.05, 0.0, "{prompt}")],
    "sd3-medium-srpo": [
        ("refl", "dfn-clip", 0.1, 0.7, "{prompt}"),
        ("srpo", "hpsv2.1", 5.0, 0.7, "{adjective}. {prompt}"),
    ],
    "sd35-large-srpo": [
        ("refl", "dfn-clip", 0.1, 0.7, "{prompt}"),
        ("srpo", "hpsv2.1", 5.0, 0.7, "{adjective}. {prompt}"),
    ],
}


def text(name: str) -> str:
    return files("dmdr_train.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def value(recipe: Recipe, key: str) -> Any:
    """The value of a key, or None if one of its sections is null."""
    found: Any = recipe
    for part in key.split("."):
        found = None if found is None else getattr(found, part)
    return found


@pytest.mark.parametrize(("model", "stage"), RECIPES)
def test_settings(model: str, stage: str) -> None:
    recipe, rows = load_recipe(f"{model}-{stage}"), STAGES[stage]
    expected = {(line, key): values[MODELS.index(model)] for line, key, *values in rows}
    assert {(line, key): value(recipe, key) for line, key in expected} == expected


@pytest.mark.parametrize(("model", "stage"), RECIPES)
def test_objectives(model: str, stage: str) -> None:
    matching, *rewards = load_recipe(f"{model}-{stage}").objectives
    assert (matching.kind, matching.weight) == ("distribution_matching", 1.0)
    found = [(o.kind, o.reward.name, o.weight, o.margin, o.template) for o in rewards]
    assert found == OBJECTIVES.get(f"{model}-{stage}", [])
    assert all((o.start, o.stop, o.ramp) == (0, None, 0) for o in (matching, *rewards))


@pytest.mark.parametrize(("model", "stage"), [each for each in RECIPES if each[1] != "cold-start"])
def test_the_rates_that_were_probably_in_force_stand_beside_the_documented_ones(model: str, stage: str) -> None:
    """8b: DeepSpeed restored the rates of the cold start. They are comments, which take effect as they stand."""
    written = text(f"{model}-{stage}")
    documented = re.sub(r"(?m)^  (generator|fake_score): \{lr.*\n", "", written)
    found = from_yaml(re.sub(r"(?m)^  # ((?:generator|fake_score): \{lr.*)$", r"  \1", documented))
    cold = load_recipe(f"{model}-cold-start").optim
    assert {name: found["optim"][name]["lr"] for name in ("generator", "fake_score")} == {
        "generator": cold.generator.lr,
        "fake_score": cold.fake_score.lr,
    }
    assert found["optim"]["generator"]["weight_decay"] == cold.generator.weight_decay


def test_lora_targets_of_the_families() -> None:
    """8: the attention projections of both streams in SD3; the projections of queries and values in SiT. 8b: the second
    attention of SD3.5-Medium is not adapted, nor are SDXL's embeddings of time and size."""
    projections = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_q", "to_v", "to_out.0")
    assert set(SD3.lora_targets) == {f"attn.{name}" for name in projections}
    assert SiT.lora_targets == ("to_q", "to_v")
    assert [target for target in SDXL.lora_targets if target.endswith(("linear_1", "linear_2"))] == []
    assert [target for target in SD3.lora_targets if "attn2" in target] == []
    assert LAYOUT.max_tokens == 128


def test_our_own_recipes_take_the_authors_values() -> None:
    """Both stages of SD3-Medium in one run, and SDXL with four steps, differ from a cold start where they say so."""
    for name, basis, others in (
        ("sd3-medium-joint", "sd3-medium-cold-start", {"optim.generator.schedule", "optim.fake_score.schedule"}),
        ("sdxl-4step", "sdxl-1step-cold-start", {"rollout.steps", "run.init_from"}),
    ):
        ours, theirs = load_recipe(name), load_recipe(basis)
        rows = {key for _, key, *_ in STAGES["cold-start"]} - {"run.steps", "optim.accumulation"}
        assert {key for key in rows if value(ours, key) != value(theirs, key)} == others
    assert load_recipe("sdxl-4step").rollout.steps == 4
    joint, refl = load_recipe("sd3-medium-joint"), load_recipe("sd3-medium-refl")
    assert [o.model_copy(update={"start": 0}) for o in joint.objectives] == refl.objectives
    assert [o.start for o in joint.objectives] == [0, 2000, 2000]
    assert joint.run.steps == load_recipe("sd3-medium-cold-start").run.steps + refl.run.steps


def test_recipes_for_one_card_take_the_authors_values() -> None:
    """They reach the authors' batches with few pictures at a time, and differ beyond that where they say so."""
    for name, model, stage, at_once, others in (
        ("sd35-large-24gb", "sd35-large", "cold-start", 1, set()),
        ("sd35-large-48gb", "sd35-large", "refl", 1, {"run.init_from"}),
        ("sdxl-1step-80gb", "sdxl-1step", "cold-start", 12, {"model.resolution", "optim.precision"}),
    ):
        ours, theirs = load_recipe(name), load_recipe(f"{model}-{stage}")
        assert at_once * ours.optim.accumulation == ours.optim.batch_size == theirs.optim.batch_size
        rows = {key for _, key, *_ in STAGES[stage]} - {"optim.accumulation"}
        assert {key for key in rows if value(ours, key) != value(theirs, key)} == others
        assert ours.objectives == theirs.objectives
        assert "No training at full size yet." in text(name)  # steps have run on a GPU
    assert load_recipe("sdxl-1step-80gb").model.resolution == 1024  # SDXL's own
    assert {name: load_recipe(f"sd35-large-{name}").memory.quantize for name in ("24gb", "48gb")} == {
        "24gb": "nf4",
        "48gb": "int8",
    }
    assert load_recipe("sd35-large-48gb").run.init_from == load_recipe("sd35-large-24gb").run.output


RTDMD: list[tuple[str, Any, Any]] = [
    ("model.resolution", 1024, 1024),
    ("model.generator_lora.rank", 32, 32),
    ("model.generator_lora.alpha", 64, 64),
    ("model.generator_lora.init", "gaussian", "gaussian"),
    ("model.fake_score_lora.rank", 32, 32),
    ("model.fake_score_lora.alpha", 64, 64),
    ("rollout.steps", 4, 4),
    ("rollout.mode", "cps", "cps"),
    ("rollout.eta", 0.9, 0.9),
    ("rollout.shift", 3, 3),
    ("rollout.group_size", 1, 16),
    ("rollout.group_noise", "own", "steps"),
    ("rollout.positions", "independent", "stratified"),
    ("guidance.renoise_from", "next_state", "next_state"),
    ("guidance.consistency", 0.01, 0.01),
    ("guidance.cfg", 7, 7),
    ("guidance.cfg_jitter", 0, 0),
    ("guidance.fake_scale", 1, 1),
    ("optim.generator.lr", 3e-5, 3e-6),
    ("optim.generator.weight_decay", 0, 1e-4),
    ("optim.fake_score.lr", 3e-5, 3e-5),
    ("optim.fake_score.weight_decay", 0, 0),
    ("optim.clip", 1, 1),
    ("optim.ema", 0.99, 0.9),
    ("run.seed", 42, 42),
]
"""Both stages of arXiv 2605.26108 on SD3-Medium, from the configuration that its authors publish."""


def test_rtdmds_setting() -> None:
    cold, both = load_recipe("sd3-medium-rtdmd-cold-start"), load_recipe("sd3-medium-rtdmd")
    assert {key: (value(cold, key), value(both, key)) for key, *_ in RTDMD} == {key: (a, b) for key, a, b in RTDMD}
    assert (cold.guidance.ratio, cold.run.steps, cold.optim.batch_size) == (10, 15000, 8 * 9)
    assert both.run.init_from == cold.run.output
    assert [(o.kind, o.weight) for o in both.objectives[:4]] == [("distribution_matching", 1e-3), *3 * [("grpo", 1)]]
    assert all(o.steps is None for o in both.objectives[1:4])  # theirs: two of these three, drawn anew
    trained, last = ([(o.reward, o.kind) for o in both.objectives[i : i + 3]] for i in (1, 4))
    assert [reward for reward, _ in trained] == [reward for reward, _ in last]
    assert [kind for _, kind in last] == 3 * ["final_refl"]
    scale = {"clip": 1, "hpsv2.1": 1, "pickscore": 26}  # theirs is a 26th
    for objective in both.objectives[4:]:
        assert objective.weight * scale[objective.reward.name] == pytest.approx(1e-4, rel=0.02)
        assert objective.margin == 3 * scale[objective.reward.name]
    for name in ("sd3-medium-rtdmd", "sd3-medium-rtdmd-cold-start"):
        assert "No training at full size yet." in text(name)  # steps have run on a GPU


def test_decoupled_recipes_differ_in_their_objective_alone() -> None:
    for name, basis in (("sd35-large-decoupled", "sd35-large-cold-start"), ("sdxl-4step-decoupled", "sdxl-4step")):
        ours, theirs = load_recipe(name), load_recipe(basis)
        assert [o.kind for o in ours.objectives] == ["decoupled_matching"]
        assert ours.run.output == f"runs/{name}"
        same = {"objectives": theirs.objectives, "run": theirs.run}
        assert ours.model_copy(update=same) == theirs
        assert "Not run at full size yet." in text(name)


def test_the_sub_interval_recipe_differs_in_where_noise_is_added_alone() -> None:
    name = "sd35-large-sub-interval"
    ours, theirs = load_recipe(name), load_recipe("sd35-large-cold-start")
    assert ours.guidance.renoise_from == "next_state"
    assert ours.run.output == f"runs/{name}"
    guidance = ours.guidance.model_copy(update={"renoise_from": theirs.guidance.renoise_from})
    assert ours.model_copy(update={"guidance": guidance, "run": theirs.run}) == theirs
    assert "Not run at full size yet." in text(name)


REGRESSION: list[tuple[str, str, Any]] = [
    ("8b, SDXL regression: LPIPS", "distance.kind", "lpips"),
    ("8b, SDXL regression: as DMD2's", "distance.pooling", "average"),
]
REGRESSIONS_RUN: list[tuple[str, str, Any]] = [
    ("8b, SDXL regression: batch", "optim.batch_size", 256),
    ("8b, SDXL regression: decoded by the tiny VAE", "model.vae", "models/taesdxl"),
    ("8b, SDXL regression: pairs at guidance", "guidance.cfg", 8.0),
    ("8b, start values", "model.fake_score_lora.init", "gaussian"),
    ("8, steps of the student", "rollout.steps", 1),
]


def test_regression_before_sdxls_cold_start() -> None:
    """8, initial weights: 10,000 pairs. 8b: what DMD2's regression is."""
    assert "--config sdxl-regression -o pairs --count 10000 --guidance 8 " in text("sdxl-regression")
    recipe = load_recipe("sdxl-regression")
    (objective,) = recipe.objectives
    for rows, section in ((REGRESSION, objective), (REGRESSIONS_RUN, recipe)):
        expected = {(line, key): number for line, key, number in rows}
        found: Any = section
        assert {(line, key): value(found, key) for line, key in expected} == expected
