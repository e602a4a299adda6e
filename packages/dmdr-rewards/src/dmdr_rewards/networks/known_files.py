"""Published weights that a hash tells apart, where the names and shapes of their tensors do not.

A hash stands here only if a page or the file's own name shows it. No page with the hash of HPS v2.1 was found, so its
file is not compared, and only files of v2.0 are recognised.
"""

from typing import NamedTuple


class KnownFile(NamedTuple):
    """The first digits of a file's SHA-256, what it is, and the reward or network that takes it; None for no one."""

    sha256: str
    name: str
    taken_by: str | None


KNOWN = (
    # https://huggingface.co/xswu/HPSv2/commit/75c46dbabad76847933ab54eea10e231913bf8fb
    KnownFile("9defdb2ba952d35ec1cb3334554bd4033e415d1397d742a9946d2ac884ed53a1", "HPS_v2.pt, HPS v2.0", None),
    # https://huggingface.co/spaces/xswu/HPSv2/commit/1ba69c80d75340dc0633a93f94ad0e3b1d0a5b43, of July 2023
    KnownFile(
        "07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1",
        "HPS_v2_1.pt of July 2023, a compressed HPS v2.0 from before v2.1",
        None,
    ),
    # torch.hub ends the name of a file with the first eight digits of its hash.
    KnownFile("6726825d", "pt_inception-2015-12-05-6726825d.pth", "inception"),
    KnownFile("0cc3c7bd", "inception_v3_google-0cc3c7bd.pth", "inception"),
)


def compared(name: str, sha256: str) -> str:
    """Whether the file with this hash is an official one of the reward or network called `name`: a short text.

    It begins with "yes", "no" or "not compared".
    """
    for known in KNOWN:
        if sha256.startswith(known.sha256):
            return f"yes, {known.name}" if known.taken_by == name else f"no, it is {known.name}"
    official = [known.name for known in KNOWN if known.taken_by == name]
    return f"no, not {' or '.join(official)}" if official else "not compared, the official hash is not known here"
