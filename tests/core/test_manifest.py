"""Stored and requested manifests: the same but for versions, or refused with every difference named."""

from __future__ import annotations

from pathlib import Path

import pytest

from gfx._core.manifest import compare_manifests, plain_manifest

MANIFEST = {
    "model": "mini",
    "layers": (1, 2),
    "folder": Path("there"),
    "gfx_version": "0.1.0",
    "torch_version": "2.6.0",
}


def compare(stored, requested):
    return compare_manifests(stored, requested, holder="/run holds a screen", advice="Give another `store`.")


def test_a_manifest_equals_the_one_read_back():
    assert compare(plain_manifest(MANIFEST), MANIFEST) == ""


def test_every_difference_is_named_and_refused():
    stored = plain_manifest(MANIFEST)
    with pytest.raises(ValueError, match=r"^/run holds a screen with another layers, model, which cannot") as error:
        compare(stored, MANIFEST | {"model": "tiny", "layers": (1, 3), "torch_version": "2.7.0"})
    assert str(error.value).splitlines()[1:] == [
        "- layers: [1, 2], now [1, 3]",
        "- model: 'mini', now 'tiny'",
        "Give another `store`.",
    ]


@pytest.mark.parametrize("drop", ["stored", "requested"])
def test_a_key_of_one_side_only_is_a_difference(drop):
    sides = {"stored": plain_manifest(MANIFEST), "requested": dict(MANIFEST)}
    del sides[drop]["model"]
    with pytest.raises(ValueError, match="another model,"):
        compare(**sides)


def test_other_versions_are_a_warning_that_names_them():
    stored = plain_manifest(MANIFEST)
    assert compare(stored, MANIFEST | {"torch_version": "2.7.0"}) == (
        "/run holds a screen that began with torch 2.6.0 (now 2.7.0); it goes on, but results may differ in the last "
        "digits."
    )
    both = compare(stored, MANIFEST | {"torch_version": "2.7.0", "gfx_version": "0.2.0"})
    assert "gfx 0.1.0 (now 0.2.0) and torch 2.6.0 (now 2.7.0)" in both


def test_missing_versions_are_no_difference():
    stored = {key: value for key, value in plain_manifest(MANIFEST).items() if "version" not in key}
    assert compare(stored, MANIFEST) == ""
