"""The recipe: what it takes, what it refuses, and what it says then."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dmdr_train.base.errors import UserError
from dmdr_train.objectives.distribution_matching import DistributionMatchingSection
from dmdr_train.objectives.refl import ReFL, ReFLSection
from dmdr_train.recipe import schema
from dmdr_train.recipe.load import BUILT_IN, dump_recipe, from_yaml, load_recipe, parse_recipe

REFL = {"kind": "refl", "reward": {"name": "class-label", "checkpoint": "reward"}}


@pytest.fixture
def write(tmp_path: Path, make_recipe_dict: Callable[..., dict[str, Any]]) -> Callable[..., str]:
    """write(optim__batch_size=8) writes the smallest recipe, so changed, and returns its path."""

    def write(**changes: Any) -> str:
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump(make_recipe_dict(**changes)))
        return str(path)

    return write


def test_defaults_then_file_then_overrides(write: Callable[..., str]) -> None:
    config = write(guidance__cfg=3.0, rollout__steps=4)
    found = load_recipe(config, ["rollout.steps=2", "optim.fake_score.betas=[0, 0.9]", "optim.ema=0.5"])
    assert found.optim.clip == 1.0  # nobody says otherwise
    assert found.guidance.cfg == 3.0  # the file
    assert found.rollout.steps == 2  # the command line, over the file
    assert found.optim.fake_score.betas == (0.0, 0.9)
    assert found.optim.generator.betas == (0.9, 0.999)
    assert found.optim.ema == 0.5


def test_overrides_reach_into_lists_and_missing_sections(write: Callable[..., str]) -> None:
    found = load_recipe(
        write(objectives=[{"kind": "distribution_matching"}, REFL]),
        ["objectives.1.weight=0.25", "guidance.dynamics.steps=7", "guidance.dynamics.renoise.alpha=2", "run.seed=3"],
    )
    assert found.objectives[1].weight == 0.25
    assert found.guidance.dynamics == schema.Dynamics(steps=7, renoise=schema.Renoise(alpha=2.0))
    assert found.run.seed == 3


def test_an_override_leaves_what_is_an_alias_of_its_section_alone() -> None:
    found = load_recipe("demo-t2i", ["model.generator_lora.rank=8", "objectives.1.reward.precision=bf16"])
    assert found.model.generator_lora is not None
    assert found.model.fake_score_lora is not None
    assert (found.model.generator_lora.rank, found.model.fake_score_lora.rank) == (8, 32)
    assert [objective.reward.precision for objective in found.objectives[1:]] == ["bf16", "fp32"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        # a wrong key, at every level, with the nearest that is right
        ("optimm.clip=1", "optimm: unknown key; did you mean optim?"),
        ("optim.batchsize=4", "optim.batchsize: unknown key; did you mean optim.batch_size?"),
        ("optim.generator.rl=1e-3", "optim.generator.rl: unknown key; did you mean optim.generator.lr?"),
        ("guidance.dynamics={step: 5}", "guidance.dynamics.step: unknown key; did you mean guidance.dynamics.steps?"),
        (
            "guidance.dynamics={steps: 5, renoise: {alfa: 2}}",
            "guidance.dynamics.renoise.alfa: unknown key; did you mean guidance.dynamics.renoise.alpha?",
        ),
        ("objectives.0.wait=1", "objectives.0.wait: unknown key; did you mean objectives.0.weight?"),
        ("objectives.1.reward.nam=x", "objectives.1.reward.nam: unknown key; did you mean objectives.1.reward.name?"),
        (
            "rollout.zzzzz=1",
            "rollout.zzzzz: unknown key; valid are eta, group_noise, group_size, mode, positions, reuse, shift, states",
        ),
        # a wrong type
        ("run.steps=many", "run.steps: should be a valid integer, unable to parse string as an integer, got 'many'"),
        ("run.steps=1.5", "run.steps: should be a valid integer, got a number with a fractional part, got 1.5"),
        ("optim=3", "optim: should be a section of keys and values, as in {key: value}, got 3"),
        ("optim.generator.lr=null", "optim.generator.lr: should be a valid number, got None"),
        ("data.classes=some", "data.classes"),
        # out of range
        ("optim.batch_size=0", "optim.batch_size: should be greater than or equal to 1, got 0"),
        ("optim.ema=1", "optim.ema: should be less than 1, got 1"),
        ("optim.generator.lr=0", "optim.generator.lr: should be greater than 0, got 0"),
        ("optim.generator.lr=.inf", "optim.generator.lr: should be a finite number, got inf"),
        ("guidance.cfg=0.5", "guidance.cfg: should be greater than or equal to 1, got 0.5"),
        ("run.seed=-1", "run.seed: should be greater than or equal to 0, got -1"),
        ("objectives.1.weight=-1", "objectives.1.weight: should be greater than 0, got -1"),
        ("guidance.fake_scale=0", "guidance.fake_scale: should be greater than 0, got 0"),  # it would learn nothing
        ("optim.precision=fp8", "optim.precision: should be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        (
            "model.fake_score_lora.init=peft",
            "model.fake_score_lora.init: should be 'kaiming', 'gaussian' or 'output_gaussian', got 'peft'",
        ),
        ("optim.zero_stage=4", "optim.zero_stage: should be 0, 1, 2 or 3, got 4"),
        ("objectives.1.weight=much", "objectives.1.weight: should be a valid number"),
        ("objectives.1.ratio=2", "objectives.1.ratio: 2.0 has no effect beside a given weight; set weight: auto"),
        ("objectives.1.template=photo", "objectives.1.template: 'photo' must hold {prompt}, and no other braces"),
        ("objectives.1.template='{x} {prompt}'", "objectives.1.template: '{x} {prompt}' must hold {prompt}, and no"),
        (
            "objectives.0={kind: distribution_matching, start: 5, stop: 3}",
            "objectives.0.stop: 3 is not after its start",
        ),
        ("data.column=text", "data.column: has no effect without data.prompts; give both, or leave it out"),
        ("data.name=small", "data.name: has no effect without data.prompts; give both, or leave it out"),
        ("memory.shared_backbone=true", "memory.shared_backbone: true needs model.generator_lora; set it, or use null"),
        (
            "model.teacher_loras=[{path: style, strength: 0}]",
            "model.teacher_loras.0.strength: 0 has no effect; leave the LoRA out",
        ),
        ("model.family=sd2", "model.family: unknown model family 'sd2'; did you mean sd3?"),
        # combinations
        ("objectives.1.kind=srop", "objectives.1.kind: unknown kind of objective 'srop'; did you mean srpo?"),
        (
            "objectives.1.kind=zzz",
            "objectives.1.kind: unknown kind of objective 'zzz'; valid are ",
        ),
        ("objectives.1=3", "objectives.1: should be a section of keys and values"),
        ("objectives.1={weight: 1}", "objectives.1.kind: is required; add it to the recipe or give key=value"),
        (
            "watch.rules=[{kind: limit, metric: contrast}]",
            "watch.rules.0: a limit has one of above and below;",
        ),
        ("objectives=[]", "objectives: List should have at least 1 item after validation, not 0, got []"),
        ("objectives.1.start=10", "objectives.1.start: 10 is never reached in run.steps 10; use a smaller one"),
        ("guidance={cfg: 1.2, cfg_jitter: 0.5}", "guidance.cfg_jitter: 0.5 takes guidance.cfg 1.2 below 1"),
        ("rollout.reuse=all", "rollout.reuse: should be 'none', 'sample' or 'states', got 'all'"),
        ("rollout={states: authors, reuse: sample}", "rollout.reuse: sample does not go with rollout.states authors,"),
        ("rollout={steps: 1, reuse: states}", "rollout.reuse: states needs more than 1 in rollout.steps; use sample"),
        ("guidance.unconditional=empty_text", "guidance.unconditional: empty_text does not go with family sit"),
        ("run.init_moments=true", "run.init_moments: true has no effect without run.init_from; give one, or use false"),
        # the override itself
        ("run.steps", "run.steps: an override is written key=value"),
        ("=3", "=3: an override is written key=value"),
        ("run.steps.more=3", "run.steps.more: steps is a single value and has no keys below it"),
        ("objectives.7.weight=1", "objectives.7.weight: '7' is no position in a list of 2; positions count from 0"),
        ("objectives.x.weight=1", "objectives.x.weight: 'x' is no position in a list of 2; positions count from 0"),
        ("run.output=[", "run.output: '[' is not a YAML value; quote it"),
    ],
)
def test_a_mistake_is_named(write: Callable[..., str], override: str, said: str) -> None:
    config = write(objectives=[{"kind": "distribution_matching"}, REFL])
    with pytest.raises(UserError) as caught:
        load_recipe(config, [override])
    assert said in str(caught.value)


MATCHING, REGRESSION = {"kind": "distribution_matching"}, {"kind": "regression"}
AUTO = {**REFL, "weight": "auto"}


@pytest.mark.parametrize(
    ("objectives", "changes", "said"),
    [
        ([REGRESSION], {"data": {}}, "data.pairs: is null and regression needs them; give a folder that dmdr-train"),
        ([MATCHING], {}, "data.pairs: has no effect without an objective of kind regression; add one, or leave it out"),
        ([REGRESSION], {"rollout": {"steps": 4}}, "rollout.steps: 4 does not go with regression, which trains a sing"),
        ([REGRESSION], {"guidance": {"dynamics": {"steps": 3}}}, "guidance.dynamics: has no effect without an objecti"),
        ([REGRESSION], {"rollout": {"reuse": "sample"}}, "rollout.reuse: sample has no effect without an objective of"),
        ([{**MATCHING, "start": 4}], {"data": {}}, "objectives: none is at work from step 0 to 4; let one start or s"),
        ([{**REGRESSION, "stop": 3}, {**MATCHING, "start": 4}], {}, "objectives: none is at work from step 3 to 4; "),
        (
            [{**REGRESSION, "stop": 3}, {**MATCHING, "start": 3, "stop": 9}],
            {},
            "objectives: none is at work from step 9",
        ),
        ([REGRESSION, AUTO], {}, "objectives.1.weight: auto follows distribution matching, which is not at work"),
        ([REGRESSION, {**MATCHING, "start": 4}, {**AUTO, "start": 3}], {}, "objectives.2.weight: auto follows dist"),
        ([REGRESSION, {**MATCHING, "stop": 8}, {**AUTO, "start": 4}], {}, "objectives.2.weight: auto follows dist"),
    ],
)
def test_objectives_that_do_not_go_together(
    make_recipe_dict: Callable[..., dict[str, Any]],
    objectives: list[dict[str, Any]],
    changes: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(make_recipe_dict(objectives=objectives, **{"data": {"pairs": "pairs"}, **changes}))
    assert str(caught.value).startswith(said)


def test_all_states_do_not_serve_where_the_final_sample_is_needed(
    make_recipe_dict: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReFL, "needs", frozenset({"reward", "final_sample"}))
    with pytest.raises(UserError, match=r"^rollout.reuse: states does not go with refl, which needs the final sample"):
        parse_recipe(make_recipe_dict(objectives=[MATCHING, REFL], rollout={"steps": 4, "reuse": "states"}))


def test_a_weight_does_not_follow_its_own_objective(
    make_recipe_dict: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReFL, "needs", frozenset({"reward", "fake_score"}))
    with pytest.raises(UserError, match=r"^objectives.0.weight: auto follows distribution matching"):
        parse_recipe(make_recipe_dict(objectives=[AUTO]))
    parse_recipe(make_recipe_dict(objectives=[AUTO, MATCHING]))


def test_reward_alone_is_no_distillation(write: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="rewards alone are no distillation; add one of kind distribution_matching"):
        load_recipe(write(objectives=[REFL]))


@pytest.mark.parametrize("key", ["model.path", "optim.batch_size", "optim.generator.lr", "run.output", "run.steps"])
def test_a_missing_key_is_named(make_recipe_dict: Callable[..., dict[str, Any]], key: str) -> None:
    data = make_recipe_dict()
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        node = node[parent]
    del node[last]
    with pytest.raises(UserError) as caught:
        parse_recipe(data)
    assert str(caught.value) == f"{key}: is required; add it to the recipe or give key=value"


def test_objectives_are_told_apart_by_kind(make_recipe: Callable[..., schema.Recipe]) -> None:
    found = make_recipe(objectives=[{**REFL, "start": 4, "weight": 0.5}, {"kind": "distribution_matching"}])
    assert isinstance(found.objectives[0], ReFLSection)
    assert found.objectives[0].margin == 0.7
    assert isinstance(found.objectives[1], DistributionMatchingSection)


SRPO = {"kind": "srpo", "reward": REFL["reward"]}


@pytest.mark.parametrize(
    ("starts", "stages"),
    [
        ([], {"cold_start": 10}),
        ([("refl", 4)], {"cold_start": 4, "joint": 10}),
        ([("refl", 4), ("srpo", 4)], {"cold_start": 4, "joint": 10}),
        ([("srpo", 7), ("refl", 4)], {"cold_start": 4, "refl": 7, "srpo": 10}),
        ([("refl", 4), ("refl", 4), ("srpo", 6), ("refl", 6), ("refl", 8)], {"cold_start": 4, "refl": 6, "srpo_refl": 8,
                                                                            "refl_8": 10}),
        ([("refl", 0)], {"joint": 10}),
    ],
)  # fmt: skip
def test_stages_end_where_a_reward_joins(
    make_recipe: Callable[..., schema.Recipe], starts: list[tuple[str, int]], stages: dict[str, int]
) -> None:
    rewards = [{**{"refl": REFL, "srpo": SRPO}[kind], "start": start} for kind, start in starts]
    found = make_recipe(objectives=[*rewards, {"kind": "distribution_matching"}]).stages
    assert found == stages
    assert list(found) == list(stages)


@pytest.mark.parametrize(
    ("objectives", "stages", "matching"),
    [
        ([REGRESSION], {"regression": 10}, range(0)),
        ([REGRESSION, MATCHING], {"regression_cold_start": 10}, range(10)),
        (
            [{**REGRESSION, "stop": 4}, {**MATCHING, "start": 4}, {**AUTO, "start": 7, "stop": 9}],
            {"regression": 4, "cold_start": 7, "joint": 10},
            range(4, 10),
        ),
        (
            [REGRESSION, {**MATCHING, "start": 2, "stop": 8}, {**REFL, "start": 6}, {**SRPO, "start": 7}],
            {"regression": 2, "cold_start": 6, "refl": 7, "srpo": 10},
            range(2, 8),
        ),
        ([REGRESSION, {**REFL, "start": 6}], {"regression": 6, "joint": 10}, range(0)),
        ([REGRESSION, {**MATCHING, "start": 2}, {**REFL, "start": 2}], {"regression": 2, "joint": 10}, range(2, 10)),
    ],
)
def test_regression_is_a_stage_and_distribution_matching_another(
    make_recipe: Callable[..., schema.Recipe],
    objectives: list[dict[str, Any]],
    stages: dict[str, int],
    matching: range,
) -> None:
    found = make_recipe(objectives=objectives, data={"pairs": "pairs"})
    assert list(found.stages.items()) == list(stages.items())
    assert found.matching == ([matching] if matching else [])


def test_a_recipe_does_not_change(make_recipe: Callable[..., schema.Recipe]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_recipe().run.steps = 3


@pytest.mark.parametrize("name", sorted(path.stem for path in BUILT_IN.glob("*.yaml")))
def test_built_in_recipes(name: str) -> None:
    found = load_recipe(name)
    assert load_recipe(f"{name}.yaml") == found
    assert found.run.output == f"runs/{name}"


def test_dmd2s_numbers_of_the_regression() -> None:
    found = load_recipe("sdxl-regression")
    (objective,) = found.objectives
    assert objective.distance.model_dump() == {
        "kind": "lpips",
        "weights": "models/vgg16-397923af.pth",
        "pooling": "average",
    }
    assert (found.model.vae, found.guidance.cfg, found.run.steps) == ("models/taesdxl", 8.0, 2000)
    assert (found.optim.batch_size, found.optim.batch_size // (8 * found.optim.accumulation)) == (256, 4)
    assert (found.optim.generator.lr, found.optim.generator.weight_decay) == (1e-5, 0.01)
    header = (BUILT_IN / "sdxl-regression.yaml").read_text()
    assert "dmdr-train pairs --config sdxl-regression -o pairs --count 10000 --guidance 8 --dtype fp16" in header
    instead = re.search(r"# distance: (\{kind: latent_mse\})", header)
    assert instead is not None
    changed: Any = load_recipe("sdxl-regression", [f"objectives.0.distance={instead[1]}"]).objectives[0]
    assert changed.distance.kind == "latent_mse"
    demo: Any = load_recipe("demo-sdxl").objectives[0]
    assert demo.distance.kind == "latent_mse"


@pytest.mark.parametrize("name", sorted(path.stem for path in BUILT_IN.glob("*.yaml")))
def test_what_is_printed_can_be_read(name: str, tmp_path: Path) -> None:
    found = load_recipe(name)
    (tmp_path / "again.yaml").write_text(dump_recipe(found))
    assert load_recipe(str(tmp_path / "again.yaml")) == found


def test_inputs_are_looked_up_from_here_and_then_from_the_recipe(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    for folder in (here / "both", tmp_path / "both", tmp_path / "beside"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    config = write(
        model__path="beside",
        model__vae="both",
        model__generator="nowhere",
        objectives=[{"kind": "distribution_matching"}, {**REFL, "reward": {"name": "x", "checkpoint": "beside"}}],
    )
    found = load_recipe(config)
    assert found.model.path == str(tmp_path / "beside")
    assert found.model.vae == "both"
    assert found.model.generator == "nowhere"
    assert found.objectives[1].reward.checkpoint == str(tmp_path / "beside")
    assert found.run.output == "out"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("dmeo", "--config: no recipe 'dmeo'; did you mean demo?"),
        ("sit-xl-2-cold", "did you mean sit-xl-2-cold-start?"),
        ("nowhere/else.yaml", "give a file, or one of demo, demo-"),
    ],
)
def test_an_unknown_recipe(config: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(config)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"), [("a: [1", "is not YAML text"), ("just words", "holds no sections"), ("", "holds no sections")]
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        load_recipe(str(tmp_path / "my.yaml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 2001-02-03", "2001-02-03 is a date; put it in quotes"),
        ("a: 2001-02-33", "day is out of range"),
        ("a: !!binary aGk=", "is a bytes"),
        ("1: a", "the key 1 is no text"),
        ("a: &a [*a]", "too many values, or is nested too deeply"),
        ("[" * 60 + "]" * 60, "nested too deeply"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        (f"a: &a [{'x, ' * 400}]\nb: &b [{'*a, ' * 400}]\nc: [*b, *b]", "too many values"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_yaml_that_is_no_recipes(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_yaml(text)


def test_a_key_that_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="the key steps comes twice"):
        from_yaml("run:\n  steps: 3\n  seed: 1\n  steps: 100\n")


def test_yaml_may_name_what_comes_again() -> None:
    assert from_yaml("a: &a {b: 1}\nc: *a") == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_key_that_is_called_like_a_kind_of_ours() -> None:
    with pytest.raises(UserError, match=r"^refl: unknown key"):
        load_recipe("demo", ["refl=1"])
