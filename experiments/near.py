"""What an unknown name on the command line may have been meant to be."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf


def say(configs: str, words: Sequence[str]) -> None:
    """One line on stderr for each override whose group, choice or key is not known and resembles one that is."""
    for sentence in suggestions(configs, words):
        print(sentence, file=sys.stderr)


def suggestions(configs: str, words: Sequence[str]) -> Iterator[str]:
    groups = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in Path(configs).iterdir() if p.is_dir()}
    keys = _keys(configs, words, groups)
    for word in words:
        name, _, value = word.lstrip("+~").partition("=")
        if word.startswith("-") or not value or name.startswith("hydra"):
            continue
        if name in groups:
            for choice in value.split(","):
                if choice not in groups[name] and (close := get_close_matches(choice, groups[name])):
                    yield f"{name}={choice}: did you mean {' or '.join(f'{name}={c}' for c in close)}?"
        elif name not in keys and (close := get_close_matches(name, dict.fromkeys([*keys, *groups]), n=2, cutoff=0.75)):
            yield f"{name}={value}: did you mean {' or '.join(close)}?"


def _keys(configs: str, words: Sequence[str], groups: dict[str, list[str]]) -> list[str]:
    """Every key of the config that the valid group choices among the words make."""
    chosen = [w for w in words if "=" in w and w.split("=", 1)[1] in groups.get(w.split("=", 1)[0], ())]
    with initialize_config_dir(configs, version_base="1.3"):
        tree = compose("train", chosen)
    return list(_paths(OmegaConf.to_container(tree), ""))


def _paths(tree: object, prefix: str) -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from _paths(value, f"{prefix}{key}.")
