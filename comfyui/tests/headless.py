"""The real server, headless, with the pack installed as a user installs it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine
import numpy as np
from PIL import Image

TESTS = Path(__file__).resolve().parent
PACK = TESTS.parent
NAME = "pag_fast"  # of the pack's folder in custom_nodes
Flow = dict[str, dict[str, Any]]  # a workflow in the format of /prompt
START = 300  # seconds until it has to answer: ten on an idle machine
RUN = 120
KSAMPLER: dict[str, Any] = {
    "seed": 7,
    "steps": 3,
    "cfg": 6.0,
    "sampler_name": "euler",
    "scheduler": "normal",
    "denoise": 1.0,
}


@dataclasses.dataclass
class Result:
    """What became of a prompt.

    ``images`` are of all SaveImage nodes, (height, width, 3) in 0 to 255; ``error`` is the message
    of the node that turned red, ``node`` its id; ``refused`` is the body of a 400.
    """

    images: list[np.ndarray] = dataclasses.field(default_factory=list)
    error: str | None = None
    node: str | None = None
    refused: dict[str, Any] | None = None
    history: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def image(self) -> np.ndarray:
        """The only picture; ``RuntimeError`` with what went wrong instead."""
        if len(self.images) != 1:
            raise RuntimeError(f"{len(self.images)} pictures: {self.error or self.refused}")
        return self.images[0]


class Server:
    """A running server; ``serve`` makes one."""

    def __init__(self, base: Path, port: int) -> None:
        self.base, self.url = base, f"http://127.0.0.1:{port}"

    def get(self, path: str, **query: str) -> bytes:
        """The body of a path; ``urllib.error.HTTPError`` as it comes."""
        suffix = "?" + urllib.parse.urlencode(query) if query else ""
        with urllib.request.urlopen(self.url + path + suffix, timeout=30) as answer:
            return bytes(answer.read())

    def json(self, path: str, **query: str) -> Any:
        """Like ``get``, parsed."""
        return json.loads(self.get(path, **query))

    def status(self, path: str) -> int:
        """The status code of a path."""
        try:
            self.get(path)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status code and parsed body."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def object_info(self, node: str) -> dict[str, Any]:
        """The schema of a node; ``KeyError`` if there is none of that name."""
        return self.json(f"/object_info/{node}")[node]

    def replacements(self) -> dict[str, Any]:
        """Entries of NodeReplace by the id of the old node."""
        return self.json("/node_replacements")

    def help(self, node: str, pack: str = NAME) -> str:
        """The help page that the frontend shows for a node of a pack."""
        return self.get(f"/extensions/{pack}/docs/{node}.md").decode()

    def templates(self, pack: str = NAME) -> list[str]:
        """Names of the example workflows that the frontend lists for a pack."""
        return self.json("/workflow_templates").get(pack, [])

    def template(self, name: str, pack: str = NAME) -> dict[str, Any]:
        """An example workflow, as the frontend loads it."""
        return self.json(f"/api/workflow_templates/{pack}/{urllib.parse.quote(name)}.json")

    def log(self) -> str:
        """Everything that the server has printed."""
        return (self.base / "log.txt").read_text(encoding="utf-8", errors="replace")

    def run(self, flow: Flow) -> Result:
        """Queue a workflow and wait for its end."""
        status, answer = self.post("/prompt", {"prompt": flow, "client_id": "tests"})
        if status != 200:
            return Result(refused=answer)
        prompt, until = answer["prompt_id"], time.monotonic() + RUN
        while not (history := self.json(f"/history/{prompt}")):
            if time.monotonic() > until:
                raise TimeoutError(
                    f"A prompt did not end in {RUN} s; the log:\n{self.log()[-4000:]}"
                )
            time.sleep(0.05)
        return self._result(history[prompt])

    def _result(self, history: dict[str, Any]) -> Result:
        out = Result(history=history)
        for kind, message in history["status"]["messages"]:
            if kind == "execution_error":
                out.error, out.node = message["exception_message"].strip(), message["node_id"]
        for outputs in history["outputs"].values():
            for place in outputs.get("images", []):
                with Image.open(io.BytesIO(self.get("/view", **place))) as image:
                    out.images.append(np.asarray(image.convert("RGB")).astype(np.int64))
        return out


def install(folder: Path) -> None:
    """Copy the pack as a user would have it, and link the nodes of the tests."""
    left_out = shutil.ignore_patterns("tests", "__pycache__", ".*")
    shutil.copytree(PACK, folder / NAME, ignore=left_out)
    (folder / "tiny_nodes").symlink_to(TESTS / "tiny_nodes")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _command(root: Path, base: Path, port: int) -> list[str]:
    return [
        *(sys.executable, str(TESTS / "serve.py"), str(root)),
        *("--cpu", "--use-pytorch-cross-attention", "--listen", "127.0.0.1", "--port", str(port)),
        # everything that is written goes to a folder of ours, not to the engine
        *("--base-directory", str(base), "--database-url", "sqlite:///:memory:"),
        *("--disable-auto-launch", "--disable-api-nodes", "--dont-print-server"),
    ]


@contextmanager
def serve(base: Path, version: str | None = None) -> Iterator[Server]:
    """A server that answers, with the pack and the nodes of the tests in ``base/custom_nodes``."""
    for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
        (base / name).mkdir(parents=True, exist_ok=True)
    install(base / "custom_nodes")
    root = engine.fetch(version or engine.wanted())
    server = Server(base, _free_port())
    # the pack has to do without the project: nothing but the environment's packages is importable
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with (base / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            _command(root, base, int(server.url.rpartition(":")[2])),
            cwd=base,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with {process.returncode}:\n{server.log()}")
        try:
            server.get("/queue")
            break
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    else:
        raise TimeoutError(f"The server did not answer in {START} s; its log:\n{server.log()}")
    # core's own nodes are named by files of theirs, these by folders of ours
    failed = [line for line in server.log().splitlines() if f"Cannot import {server.base}" in line]
    if failed:
        raise RuntimeError("The server runs without " + "; ".join(failed))


def flow(name: str, *nodes: tuple[str, dict[str, Any]], controls: int = 0, **ksampler: Any) -> Flow:
    """A tiny model, a chain of MODEL → MODEL nodes, KSampler and SaveImage.

    ``nodes`` are class names and inputs without ``model``; their ids are "n0", "n1" and so on.
    ``ksampler`` replaces inputs of KSampler. Other ids: "tiny", "sampler", "image", "save".
    """
    out: Flow = {"tiny": _node("TinyModel", name=name, controls=controls)}
    model = _chain(out, ["tiny", 0], nodes)
    conditioning = {"positive": ["tiny", 1], "negative": ["tiny", 2], "latent_image": ["tiny", 3]}
    out["sampler"] = _node("KSampler", model=model, **conditioning, **(KSAMPLER | ksampler))
    out["image"] = _node("LatentAsImage", samples=["sampler", 0])
    out["save"] = _node("SaveImage", images=["image", 0], filename_prefix=name)
    return out


def emoji_flow(prompt: str, *nodes: tuple[str, dict[str, Any]], **ksampler: Any) -> Flow:
    """Like ``flow`` for the model in the box: PagFastEmoji, two prompts, VAEDecode."""
    out: Flow = {"emoji": _node("PagFastEmoji", batch_size=1)}
    model = _chain(out, ["emoji", 0], nodes)
    for name, text in (("positive", prompt), ("negative", "")):
        out[name] = _node("CLIPTextEncode", clip=["emoji", 1], text=text)
    conditioning = {"positive": ["positive", 0], "negative": ["negative", 0]}
    settings = KSAMPLER | {"cfg": 2.0, "steps": 20, "scheduler": "simple"} | ksampler
    latent = ["emoji", 3]
    out["sampler"] = _node("KSampler", model=model, latent_image=latent, **conditioning, **settings)
    out["image"] = _node("VAEDecode", samples=["sampler", 0], vae=["emoji", 2])
    out["save"] = _node("SaveImage", images=["image", 0], filename_prefix="emoji")
    return out


def _chain(out: Flow, model: list[Any], nodes: tuple[tuple[str, dict[str, Any]], ...]) -> list[Any]:
    for place, (kind, inputs) in enumerate(nodes):
        out[f"n{place}"] = _node(kind, model=model, **inputs)
        model = [f"n{place}", 0]
    return model


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
