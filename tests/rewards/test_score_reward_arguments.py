import pytest
from dmdr_rewards.base.errors import UserError
from dmdr_rewards.score.reward_arguments import RewardArgument, parse_rewards


@pytest.mark.parametrize(
    ("text", "name", "checkpoint", "weight"),
    [
        ("hpsv2.1=/a/b.pt", "hpsv2.1", "/a/b.pt", 1.0),
        ("hpsv2.1=/a/b.pt:0.3", "hpsv2.1", "/a/b.pt", 0.3),
        ("clip=C:\\ckpt\\x.bin", "clip", "C:\\ckpt\\x.bin", 1.0),
        ("clip=C:\\ckpt\\x.bin:-2", "clip", "C:\\ckpt\\x.bin", -2.0),
        ("clip=/run:3/x.bin", "clip", "/run:3/x.bin", 1.0),
        ("clip=/run:3:1", "clip", "/run:3", 1.0),
        ("clip=/a=b/x:.5e1", "clip", "/a=b/x", 5.0),
        ("clip=/a:nan", "clip", "/a:nan", 1.0),
        ("redness", "redness", None, 1.0),
        ("redness:0.5", "redness", None, 0.5),
    ],
)
def test_only_a_number_behind_the_last_colon_is_a_weight(
    text: str, name: str, checkpoint: str | None, weight: float
) -> None:
    assert parse_rewards([text], []) == [RewardArgument(name, checkpoint, weight)]


def test_options_are_read_as_json_or_text() -> None:
    options = ["hpsv2.1.preprocess=dmdr", "hpsv2.1.gain=2", "hpsv2.1.on=true", "hpsv2.1.head=/a/b=c.pth"]
    [hps, clip] = parse_rewards(["hpsv2.1=x", "clip=y"], options, preprocess="reference")
    assert hps.options == {"preprocess": "dmdr", "gain": 2, "on": True, "head": "/a/b=c.pth"}
    assert clip.options == {"preprocess": "reference"}


def test_a_column_tells_checkpoints_of_one_reward_apart() -> None:
    old, new, plain = parse_rewards(
        ["old@hpsv2.1=a.pt:0.5", "new_2@hpsv2.1=b@c.pt", "hpsv2.1=d.pt"], ["old.model=x", "hpsv2.1.model=y"]
    )
    assert old == RewardArgument("old", "a.pt", 0.5, {"model": "x"}, "hpsv2.1")
    assert new == RewardArgument("new_2", "b@c.pt", kind="hpsv2.1")
    assert plain == RewardArgument("hpsv2.1", "d.pt", options={"model": "y"})
    assert [each.reward for each in (old, new, plain)] == ["hpsv2.1"] * 3


@pytest.mark.parametrize("column", ["total", "note", "a.b", "a b"])
def test_a_column_is_a_word_that_is_free(column: str) -> None:
    with pytest.raises(UserError, match=rf"^--reward: '{column}' cannot be a column: use letters"):
        parse_rewards([f"{column}@clip=x"], [])
