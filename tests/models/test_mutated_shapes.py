"""Shapes that are not those of an SD3 component are one clear InputError, whatever is wrong with them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_mmdit import tiny_architecture
from support.tiny_parts import TINY_CLIP_G, TINY_T5, TINY_VAE

from sd3pipe.errors import InputError
from sd3pipe.models.architecture import detect_mmdit
from sd3pipe.models.text_architecture import detect_clip, detect_t5
from sd3pipe.models.vae_architecture import detect_vae

KINDS = {
    "mmdit": (tiny_architecture("sd35-medium"), detect_mmdit),
    "vae": (TINY_VAE, lambda shapes: detect_vae(shapes, "file")),
    "clip": (TINY_CLIP_G, lambda shapes: detect_clip(shapes, "file")),
    "t5": (TINY_T5, lambda shapes: detect_t5(shapes, "file")),
}
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 16, 63, 64, 65, 10**9]), max_size=5).map(tuple)
ODD_NAMES = st.sampled_from(
    [
        "joint_blocks.99.x",
        "joint_blocks..attn",
        "encoder.down.7.x",
        "encoder.block.-1.x",
        "text_model.encoder.layers.x.y",
    ]
)


@pytest.mark.parametrize("kind", KINDS)
def test_unchanged_shapes_give_the_architecture(kind):
    architecture, detect = KINDS[kind]
    assert detect(architecture.shapes()) == architecture


def test_projection_without_axes_is_refused():
    with pytest.raises(InputError, match=r"text_projection\.weight has shape \[\]"):
        detect_clip(TINY_CLIP_G.shapes() | {"text_projection.weight": ()}, "file")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_changed_shapes_are_refused_or_are_another_architecture(kind, data):
    architecture, detect = KINDS[kind]
    shapes = architecture.shapes()
    keys = sorted(shapes)
    changed = shapes | data.draw(st.dictionaries(st.sampled_from(keys) | ODD_NAMES, SHAPES, max_size=4))
    for key in data.draw(st.lists(st.sampled_from(keys), max_size=2)):
        changed.pop(key, None)
    try:
        found = detect(changed)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert found.shapes() == changed
