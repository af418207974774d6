"""The harness of the real server: it serves core's PAG and says what went wrong."""

from __future__ import annotations

import headless
import loaded
import numpy as np

PAG = ("PerturbedAttentionGuidance", {"scale": 3.0})
# what SDXL has anyway, but another prompt: an equal one comes out of the engine's cache
AS_IT_IS = ("ModelSamplingDiscrete", {"sampling": "eps", "zsnr": False})


def test_cores_pag_draws_another_picture_every_time_the_same(server: headless.Server) -> None:
    without = server.run(headless.flow("sdxl", steps=2)).image
    guided = server.run(headless.flow("sdxl", PAG, steps=2)).image
    again = server.run(headless.flow("sdxl", PAG, AS_IT_IS, steps=2)).image
    assert guided.shape == (32, 32, 3)
    assert np.abs(guided - without).max() > 10
    assert np.array_equal(guided, again)


def test_a_prompt_that_cannot_run_is_refused(server: headless.Server) -> None:
    unknown = server.run(headless.flow("sd15", ("NoSuchNode", {})))
    assert "NoSuchNode" in str(unknown.refused)
    scale = server.run(headless.flow("sd15", ("PerturbedAttentionGuidance", {"scale": 300.0})))
    assert scale.refused is not None
    assert list(scale.refused["node_errors"]) == ["n0"]


def test_a_node_that_raises_is_named(server: headless.Server) -> None:
    flow = headless.flow("flux", steps=1)
    # core's node replaces attention of a UNet, and finds no UNet
    flow["freeu"] = {"class_type": "FreeU", "inputs": {"model": ["tiny", 0]}}
    flow["freeu"]["inputs"] |= {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}
    flow["sampler"]["inputs"]["model"] = ["freeu", 0]
    red = server.run(flow)
    assert (red.node, red.error) == ("freeu", "'model_channels'")


def test_only_the_servers_own_folder_is_written_to(server: headless.Server) -> None:
    server.run(headless.flow("sd15", steps=1))
    assert any((server.base / "output").iterdir())
    assert [path.name for path in (loaded.ROOT / "output").iterdir()] == [
        "_output_images_will_be_put_here"
    ]
    assert not (loaded.ROOT / "user").exists()


def test_core_nodes_have_their_pages(server: headless.Server) -> None:
    schema = server.object_info("PerturbedAttentionGuidance")
    assert list(schema["input"]["required"]) == ["model", "scale"]
    assert server.status("/extensions/no_such_pack/docs/KSampler.md") == 404
    assert server.status("/docs/KSampler/en.md") == 200
    assert server.templates("no_such_pack") == []
