"""The real server with the pack installed: what a user sees of it."""

from __future__ import annotations

import functools
from typing import Any

import headless
import loaded
import numpy as np
import patched
import pytest
import tiny
import workflows
from PIL import Image

# isort: split
from comfyui.tools import render_workflow

# one process of xdist runs all of these: one server starts
pytestmark = pytest.mark.xdist_group("server")

PAG = ("PerturbedAttentionGuidance", {"scale": 3.0})
OURS = ("PagFastPAG", {"scale": 3.0})
# what SDXL has anyway, but another prompt: an equal one comes out of the engine's cache
AS_IT_IS = ("ModelSamplingDiscrete", {"sampling": "eps", "zsnr": False})

BLOCKS: dict[str, Any] = {
    "unet_block": "middle",
    "unet_block_id": 0,
    "sigma_start": -1.0,
    "sigma_end": -1.0,
    "rescale": 0.0,
    "rescale_mode": "full",
    "unet_block_list": "",
    "share": True,
}
# inputs behind the model and their defaults, in order
NODES: dict[str, dict[str, Any]] = {
    "PagFastPAG": {"scale": 3.0},
    "PagFastPAGAdvanced": {"scale": 3.0, "adaptive_scale": 0.0, **BLOCKS},
    "PagFastSEG": {"scale": 3.0, "blur_sigma": -1.0, **BLOCKS},
    "PagFastDiT": {
        "scale": 3.0,
        "double_blocks": "",
        "single_blocks": "",
        "start_percent": 0.0,
        "end_percent": 1.0,
        "perturbation": "identity",
        "rescale": 0.0,
        "share": True,
    },
}
RANGES = {
    "scale": (0.0, 100.0),
    "adaptive_scale": (0.0, 1.0),
    "blur_sigma": (-1.0, 9999.0),
    "sigma_start": (-1.0, 10000.0),
    "sigma_end": (-1.0, 10000.0),
    "rescale": (0.0, 1.0),
    "start_percent": (0.0, 1.0),
    "end_percent": (0.0, 1.0),
}


def _theirs(widgets: dict[str, Any]) -> dict[str, Any]:
    """Widgets without those that sd-perturbed-attention's nodes do not have."""
    return {name: value for name, value in widgets.items() if name != "share"}


# as nobody has them by default, so that a value that is lost is seen
CHANGED: dict[str, Any] = {
    "unet_block": "output",
    "unet_block_id": 3,
    "sigma_start": 20.0,
    "sigma_end": 0.5,
    "rescale": 0.4,
    "rescale_mode": "partial",
    "unet_block_list": "m0,u1",
}
REPLACED = [
    ("PerturbedAttention", "PagFastPAGAdvanced", {"scale": 2.5, "adaptive_scale": 0.1, **CHANGED}),
    ("SmoothedEnergyGuidanceAdvanced", "PagFastSEG", {"scale": 2.5, "blur_sigma": 0.7, **CHANGED}),
]


def test_the_pack_loads_and_its_inputs_are_those_that_are_documented(
    server: headless.Server,
) -> None:
    for node, defaults in NODES.items():
        info = server.object_info(node)
        inputs = workflows.inputs(info)
        assert info["category"] == "model/patch/unet"
        assert (info["output"], inputs["model"][0]) == (["MODEL"], "MODEL")
        order = info["input_order"]
        assert order["required"] + order.get("optional", []) == ["model", *defaults]
        assert order.get("optional", []) == [
            name for name in ("unet_block_list", "share") if name in defaults
        ]
        for name, default in defaults.items():
            options = inputs[name][1]
            assert (options["default"], type(options["default"])) == (default, type(default))
            assert options["tooltip"].endswith("."), (node, name)
            if name in RANGES:
                assert (options["min"], options["max"]) == RANGES[name]
    emoji = server.object_info("PagFastEmoji")
    assert emoji["output"] == ["MODEL", "CLIP", "VAE", "LATENT"]


def test_core_and_pag_fast_draw_the_same_picture(server: headless.Server) -> None:
    without = server.run(headless.flow("sdxl", steps=2)).image
    stock = server.run(headless.flow("sdxl", PAG, steps=2)).image
    ours = server.run(headless.flow("sdxl", OURS, steps=2)).image
    again = server.run(headless.flow("sdxl", OURS, AS_IT_IS, steps=2)).image
    assert stock.shape == (*tiny.build("sdxl").shape[-2:], 3)
    assert np.array_equal(stock, ours)
    assert np.array_equal(ours, again)
    assert np.abs(stock - without).max() > 10


def test_core_and_pag_fast_draw_the_same_emoji(server: headless.Server) -> None:
    options = {"steps": 4, "cfg": 1.0}
    without = server.run(headless.emoji_flow("penguin", **options)).image
    stock = server.run(headless.emoji_flow("penguin", PAG, **options)).image
    ours = server.run(headless.emoji_flow("penguin", OURS, **options)).image
    assert stock.shape == (64, 64, 3)
    assert np.array_equal(stock, ours)
    assert np.abs(stock - without).max() > 0  # the middle block matters little in this model


@pytest.mark.parametrize(
    "name, node, widgets, words",
    [
        ("flux", "PagFastPAG", {}, "PAG Fast: this model is a Flux (Flux), which has no UNet "
         "blocks: use PAG Fast (DiT)."),
        ("sd15", "PagFastPAGAdvanced", {"unet_block": "input", "unet_block_id": 3},
         "unet_block_id 3 of input has no self-attention that could be perturbed; this model has "
         "it in input blocks 1, 2, 4, 5, 7, 8."),
        ("sd15", "PagFastPAGAdvanced", {"unet_block_list": "m0,x3"},
         "unet_block_list: 'x3' is no block. Write d, m or u, a number or a span, and perhaps a "
         "dot and transformer blocks: m0, u0.4, d2.2-9."),
        ("sd15", "PagFastDiT", {}, "PAG Fast (DiT): UNetModel has no list of transformer blocks: "
         "use PAG Fast."),
    ],
)  # fmt: skip
def test_a_wrong_choice_turns_the_node_red_and_says_what_is_right(
    server: headless.Server, name: str, node: str, widgets: dict[str, Any], words: str
) -> None:
    red = server.run(headless.flow(name, (node, NODES[node] | widgets), steps=1))
    assert (red.node, red.error, red.images) == ("n0", words, [])


def test_a_scale_out_of_range_is_refused(server: headless.Server) -> None:
    refused = server.run(headless.flow("sd15", ("PagFastPAG", {"scale": 300.0}))).refused
    assert refused is not None
    ((node, errors),) = refused["node_errors"].items()
    (error,) = errors["errors"]
    assert (node, error["type"]) == ("n0", "value_bigger_than_max")
    assert (error["message"], error["details"]) == ("Value 300.0 bigger than max of 100.0", "scale")


def test_help_pages_name_every_input(server: headless.Server) -> None:
    for node, defaults in NODES.items():
        page = server.help(node)
        title = server.object_info(node)["display_name"]
        assert page.splitlines()[0] == f"# {title}"
        assert "Source" in page or node in ("PagFastPAGAdvanced", "PagFastDiT")
        # SEG's page refers to the advanced node's for what they have in common
        for name in defaults if node != "PagFastSEG" else ("blur_sigma",):
            assert name in page
    assert "batch_size" in server.help("PagFastEmoji")
    # core's have theirs, and nobody else's are ours
    assert server.status("/extensions/pag_fast/docs/KSampler.md") == 404


def test_replacements_are_listed(server: headless.Server) -> None:
    listed = server.replacements()
    for theirs, ours, widgets in REPLACED:
        (entry,) = listed[theirs]
        assert (entry["old_node_id"], entry["new_node_id"]) == (theirs, ours)
        assert entry["old_widget_ids"] == list(widgets) == list(_theirs(NODES[ours]))


@pytest.mark.parametrize("theirs, ours, widgets", REPLACED)
def test_a_prompt_with_nodes_of_sd_perturbed_attention_runs_unchanged(
    server: headless.Server, theirs: str, ours: str, widgets: dict[str, Any]
) -> None:
    # with share another prompt than theirs becomes, which is not in the engine's cache
    whole = {"share": False}
    expected = server.run(headless.flow("sd15", (ours, widgets | whole), steps=2)).image
    assert np.array_equal(
        server.run(headless.flow("sd15", (theirs, widgets), steps=2)).image, expected
    )
    # the list is optional, and scripts leave it out
    listed = {name: value for name, value in widgets.items() if name != "unet_block_list"}
    expected_block = server.run(headless.flow("sd15", (ours, listed | whole), steps=2)).image
    block = server.run(headless.flow("sd15", (theirs, listed), steps=2)).image
    assert np.array_equal(block, expected_block)
    assert np.abs(block - expected).max() > 0
    # what is required is asked for by its name
    del listed["scale"]
    refused = server.run(headless.flow("sd15", (theirs, listed), steps=2)).refused
    assert refused is not None
    assert refused["node_errors"]["n0"]["errors"][0]["type"] == "required_input_missing"


def _saved_with_theirs(node: str, values: list[Any]) -> dict[str, Any]:
    """A workflow as the browser has saved it with a node of sd-perturbed-attention."""
    sampling = [7, "fixed", 2, 6.0, "euler", "normal", 1.0]
    linked = {"model": 2, "positive": 3, "negative": 4, "latent_image": 5}
    kinds = {"model": "MODEL", "latent_image": "LATENT"}
    nodes: list[tuple[int, str, list[Any], list[Any], list[Any]]] = [
        (1, "TinyModel", [],
         [("MODEL", [1]), ("positive", [3]), ("negative", [4]), ("LATENT", [5])], ["sd15", 0]),
        (2, node, [("model", "MODEL", 1)], [("MODEL", [2])], values),
        (3, "KSampler", [(k, kinds.get(k, "CONDITIONING"), v) for k, v in linked.items()],
         [("LATENT", [6])], sampling),
        (4, "LatentAsImage", [("samples", "LATENT", 6)], [("IMAGE", [7])], []),
        (5, "SaveImage", [("images", "IMAGE", 7)], [], ["theirs"]),
    ]  # fmt: skip
    return {
        "nodes": [
            {
                "id": number,
                "type": kind,
                "inputs": [{"name": n, "type": t, "link": link} for n, t, link in taken],
                "outputs": [{"name": n, "links": links} for n, links in given],
                "widgets_values": saved,
            }
            for number, kind, taken, given, saved in nodes
        ],
        "links": [
            [1, 1, 0, 2, 0, "MODEL"],
            [2, 2, 0, 3, 0, "MODEL"],
            [3, 1, 1, 3, 1, "CONDITIONING"],
            [4, 1, 2, 3, 2, "CONDITIONING"],
            [5, 1, 3, 3, 3, "LATENT"],
            [6, 3, 0, 4, 0, "LATENT"],
            [7, 4, 0, 5, 0, "IMAGE"],
        ],
    }


@pytest.mark.parametrize("theirs, ours, widgets", REPLACED)
def test_a_saved_workflow_keeps_every_value(
    server: headless.Server, theirs: str, ours: str, widgets: dict[str, Any]
) -> None:
    info = functools.cache(server.object_info)
    saved = _saved_with_theirs(theirs, list(widgets.values()))
    prompt = workflows.to_prompt(workflows.replace(saved, server.replacements(), info), info)
    assert prompt["2"]["class_type"] == ours
    assert prompt["2"]["inputs"] == {"model": ["1", 0], **widgets, "share": True}
    # saved before the pack had the later widgets: these are at their defaults
    saved = _saved_with_theirs(theirs, list(widgets.values())[:4])
    old = workflows.to_prompt(workflows.replace(saved, server.replacements(), info), info)
    assert old["2"]["inputs"] == {
        "model": ["1", 0], **NODES[ours], **dict(list(widgets.items())[:4])
    }  # fmt: skip
    expected = server.run(headless.flow("sd15", (ours, widgets | {"share": False}), steps=2)).image
    assert np.array_equal(server.run(prompt).image, expected)


def test_templates_are_listed_with_pictures(server: headless.Server) -> None:
    assert sorted(server.templates()) == workflows.NAMES
    for name in workflows.NAMES:
        assert server.template(name) == workflows.load(name)
        with Image.open(workflows.EXAMPLES / f"{name}.jpg") as picture:
            assert picture.format == "JPEG"
            # drawn anew after a change
            assert picture.size == render_workflow.draw(workflows.load(name)).size
        assert server.status(f"/api/workflow_templates/pag_fast/{name}.jpg") == 200


def test_the_emoji_template_runs_and_pag_is_seen_in_it(server: headless.Server) -> None:
    prompt = workflows.to_prompt(
        server.template("pag_fast_emoji"), functools.cache(server.object_info)
    )
    result = server.run(prompt)
    assert (result.error, result.refused) == (None, None)
    outputs = result.history["outputs"]
    saves = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    count = len(outputs[saves[0]]["images"])
    assert len(saves) == 2 and len(result.images) == 2 * count
    for off, on in zip(result.images[:count], result.images[count:], strict=True):
        assert np.abs(off - on).mean() > 4  # of 255


@pytest.mark.parametrize(
    "name, missing",
    [
        ("pag_fast_sdxl", {"ckpt_name"}),
        ("pag_fast_flux", {"unet_name", "clip_name1", "clip_name2", "vae_name"}),
    ],
)
def test_other_templates_lack_nothing_but_the_models(
    server: headless.Server, name: str, missing: set[str]
) -> None:
    prompt = workflows.to_prompt(server.template(name), functools.cache(server.object_info))
    refused = server.run(prompt).refused
    assert refused is not None
    errors = [error for node in refused["node_errors"].values() for error in node["errors"]]
    assert {error["type"] for error in errors} == {"value_not_in_list"}
    assert {error["extra_info"]["input_name"] for error in errors} == missing
    # and the browser knows where to get them
    models = [
        model["directory"]
        for node in server.template(name)["nodes"]
        for model in node["properties"].get("models", [])
    ]
    assert len(models) == len(missing)


def test_only_the_servers_own_folder_is_written_to(server: headless.Server) -> None:
    server.run(headless.flow("sd15", steps=1))
    assert any((server.base / "output").iterdir())
    assert [path.name for path in (loaded.ROOT / "output").iterdir()] == [
        "_output_images_will_be_put_here"
    ]
    assert not (loaded.ROOT / "user").exists()


def test_what_the_tests_call_by_hand_has_the_documented_defaults() -> None:
    given = {"PagFastPAGAdvanced": patched.ADVANCED, "PagFastSEG": patched.SEG}
    for node, widgets in (given | {"PagFastDiT": patched.DIT}).items():
        assert widgets == NODES[node]
