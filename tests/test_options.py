"""Every option takes every kind of number that is one, and says in a sentence what it does not."""

from __future__ import annotations

import copy
import pickle
import random
import re
import types
from dataclasses import fields
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction

import numpy
import pytest
import tiny_ltx2
import tiny_sag
import torch
from tiny import build, call_kwargs, latents

import pag_fast
from pag_fast import Branch, CompileConfig, PatchConfig, Reuse, Schedule
from pag_fast.perturbations import BlurredMap, BlurredQueries, NoisyScores, SoftIdentity
from pag_fast.settings.checks import edge, number, whole_number
from pag_fast.settings.layers import as_list


def _id(value):
    """The value in the name of its test: without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


class Two(IntEnum):
    TWO = 2


NUMBERS = [
    2,
    2.0,
    Two.TWO,
    Fraction(4, 2),
    Decimal("2.0"),
    numpy.float16(2),
    numpy.float64(2),
    numpy.longdouble(2),
    numpy.int8(2),
    numpy.uint64(2),
    numpy.array(2.0),
    numpy.array(2),
    torch.tensor(2),
    torch.tensor(2.0),
    torch.tensor(2.0, dtype=torch.bfloat16),
    torch.nn.Parameter(torch.tensor(2.0)),
]
NO_NUMBERS = [
    True,
    "2",
    b"2",
    2j,
    2 + 0j,
    float("nan"),
    float("inf"),
    -float("inf"),
    Decimal("nan"),
    Decimal("1e999"),
    10**400,
    Fraction(10**400),
    numpy.bool_(True),
    numpy.float32("nan"),
    numpy.complex64(2),
    numpy.array([2.0]),
    numpy.array("2"),
    numpy.array(2, dtype="timedelta64[ns]"),
    numpy.datetime64(2, "ns"),
    torch.tensor([2.0]),
    torch.tensor(True),
    torch.tensor(float("nan")),
    torch.tensor(2j),
    torch.empty((), device="meta"),
    [2.0],
    (),
    {},
    {2.0},
    object(),
    lambda: 2.0,
    float,
]
# how to set each number there is among the options, and to read it again
OPTIONS = {
    "pag_scale": lambda x: PatchConfig(pag_scale=x).pag_scale,
    "pag_adaptive_scale": lambda x: PatchConfig(pag_adaptive_scale=x).pag_adaptive_scale,
    "adaptive": lambda x: Schedule(adaptive=x).adaptive,
    "sigma_start": lambda x: Schedule(sigma_start=x).sigma_start,
    "sigma_end": lambda x: Schedule(sigma_end=x).sigma_end,
    "per_step": lambda x: Schedule(per_step=[x]).per_step[0],
    "drift": lambda x: Reuse(drift=x).drift,
    "Branch": lambda x: Branch("mid", scale=x).scale,
    "blur_map": lambda x: BlurredMap(x).sigma,
    "noise": lambda x: NoisyScores(x).sigma,
    "blur": lambda x: BlurredQueries(x).sigma,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_real_number_is_one(option):
    for value in NUMBERS:
        stored = OPTIONS[option](value)
        assert type(stored) is float and stored == 2.0, value


@pytest.mark.parametrize("option", OPTIONS)
def test_nothing_else_is_a_number(option):
    for value in NO_NUMBERS:
        if option == "blur" and type(value) is float and value == float("inf"):
            continue  # the mean of all queries: its default
        with pytest.raises(ValueError, match=r"must be a number.*; got"):
            OPTIONS[option](value)


@pytest.mark.parametrize("option", sorted({*OPTIONS} - {"sigma_start", "sigma_end"}))
def test_negative_numbers(option):
    for value in (-1, -1e-9, numpy.float32(-2), torch.tensor(-1.0), Fraction(-1, 3)):
        with pytest.raises(ValueError, match="must be a number"):
            OPTIONS[option](value)


def test_strengths_and_rescale_are_from_0_to_1():
    for one in (1, numpy.float32(1), torch.tensor(1), Fraction(1), Decimal(1)):
        assert SoftIdentity(one).strength == 1.0 and type(SoftIdentity(one).strength) is float
        assert SoftIdentity([one, 0]).strength == (1.0, 0.0)
        assert PatchConfig(rescale_mode="cfg", rescale=one).rescale == 1.0
    for wrong in (*NO_NUMBERS, 1.5, -0.5, torch.tensor(1.5)):
        with pytest.raises(ValueError, match=r"needs rescale, which must be a number from 0 to 1"):
            PatchConfig(rescale_mode="full", rescale=wrong)


def test_whole_numbers():
    for value in (2, Two.TWO, numpy.int64(2), numpy.array(2), torch.tensor(2)):
        assert type(Reuse(every=value).every) is int and Reuse(every=value).every == 2
        assert NoisyScores(seed=value).seed == 2
        schedule = Schedule(stop=value)
        assert type(schedule.stop) is int and schedule.stop == 2
    for value in (*NO_NUMBERS, 2.0, 2.5, 0, -1, torch.tensor(2.0), Fraction(2), numpy.float32(2)):
        with pytest.raises(ValueError, match="must be a whole number of at least 1; got"):
            Reuse(every=value)
    assert whole_number("n", 2**63 - 1, least=0) == 2**63 - 1
    assert NoisyScores(seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(ValueError, match=r"seed must be an integer from 0 to 2\*\*63"):
        NoisyScores(seed=2**63)


@pytest.mark.parametrize("asked", [pag_fast.explain, pag_fast.layer_costs])
def test_sizes_are_whole_numbers(asked):
    pipe = build("StableDiffusionPAGPipeline")
    for wrong in (*NO_NUMBERS, 64.0, 0, -8):
        for name in ("height", "width", "frames"):
            with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1"):
                asked(pipe, **{name: wrong})
    with pytest.raises(ValueError, match="frames is for pipelines that make videos"):
        asked(pipe, frames=9)
    switch = "cfg" if asked is pag_fast.layer_costs else "flops"
    with pytest.raises(ValueError, match=f"{switch} must be True or False; got 'yes'"):
        asked(pipe, **{switch: "yes"})
    assert str(asked(pipe, height=numpy.int64(64), width=torch.tensor(64)))


@pytest.mark.parametrize("build_other", [tiny_sag.build_sag, tiny_ltx2.build])
def test_sizes_of_pipelines_without_pag_are_whole_numbers_too(build_other):
    for wrong in ("64", 64.0, True, 0):
        with pytest.raises(ValueError, match="height must be a whole number of at least 1"):
            pag_fast.explain(build_other(), height=wrong)


def test_fractions_of_the_steps_stay_fractions():
    for value in (0.5, numpy.float32(0.5), torch.tensor(0.5), Fraction(1, 2), Decimal("0.5")):
        assert type(edge("stop", value)) is float
        assert Schedule(stop=value) == Schedule(stop=0.5)
    assert Schedule(stop=numpy.float64(1)).stop == 1.0 and Schedule(stop=numpy.int32(1)).stop == 1
    with pytest.raises(ValueError, match="stop must be a fraction of the steps"):
        Schedule(stop=torch.tensor(2.0))


def test_the_sentence_names_option_limit_and_value():
    with pytest.raises(ValueError, match=r"^x must be a number, and finite; got nan\.$"):
        number("x", float("nan"))
    with pytest.raises(ValueError, match=r"^x must be a number from 1 to 2; got 3\.$"):
        number("x", 3, least=1, most=2)
    with pytest.raises(ValueError, match=r"^x must be a number of at least 1, and finite; got inf"):
        number("x", float("inf"), least=1)
    assert number("x", float("inf"), infinite=True) == float("inf")


def test_scales_of_a_call():
    """Those of a call are what those of a patch are."""
    from tiny_hosts import build, call_kwargs, latents

    name = "StableDiffusionPipeline"
    pipe = pag_fast.patch(build(name), "mid")
    run = lambda scale: latents(pipe, {**call_kwargs(name, pipe), "pag_scale": scale})  # noqa: E731
    wanted = run(2.0)
    for value in NUMBERS[::3]:
        assert torch.equal(run(value), wanted)
    for value in NO_NUMBERS:
        with pytest.raises(ValueError, match="pag_scale must be a number of at least 0"):
            run(value)


# ---- layers ----


@pytest.mark.parametrize(
    "layers",
    [
        *("", " ", "\n\t", ["mid", ""], (" ",)),
        *(3.5, True, {}, {"mid"}, {"mid": 1}, b"mid", bytearray(b"mid"), object(), ...),
        *([None], [3.5], [b"mid"], [True], [["mid"]], [("mid",)], [], ()),
        *(x for x in [numpy.array(["mid"]), torch.tensor([1]), memoryview(b"mid")]),
    ],
    ids=_id,
)
def test_bad_layers_are_a_sentence(layers):
    for take in (as_list, PatchConfig, Branch, lambda x: pag_fast.patch(_unet(), x)):
        with pytest.raises(ValueError, match=r"(?i)layer.*(e\.g\.)") as error:
            take(layers)
        assert str(error.value).endswith(".")


def test_iterators_are_no_layers():
    for layers in ((x for x in ["mid"]), iter(["mid"]), map(str, [1]), {"a": 1}.keys()):
        with pytest.raises(ValueError, match="layers must be a name, an integer, or a list of"):
            PatchConfig(layers)


def test_good_layers():
    assert as_list(numpy.int64(13)) == [13] and type(as_list(numpy.int64(13))[0]) is int
    assert as_list([numpy.int8(1), "mid", Two.TWO]) == [1, "mid", 2]
    assert as_list(range(3)) == [0, 1, 2] and as_list(("mid",)) == ["mid"]


_PIPES: list = []


def _unet():
    if not _PIPES:
        _PIPES.append(build("StableDiffusionPAGPipeline"))
    return _PIPES[0]


# ---- anything, anywhere ----

_JUNK = [
    *NO_NUMBERS,
    *NUMBERS,
    *("", "mid", "identity", "cfg", "auto", "eager", None, False, [], ["mid"], [""], [None]),
    *(set(), {"a": 1}, ..., NotImplemented, Exception, types, range(2), -1, 0, 1.5),
    *(Schedule(), Reuse(every=2), CompileConfig(), Branch("mid"), SoftIdentity, PatchConfig()),
    *(torch.ones(2, 2), numpy.ones(3), torch.Generator(), [Branch("mid")], (Branch("mid"), 1)),
]


@pytest.mark.parametrize("cls", [PatchConfig, Schedule, Reuse, CompileConfig, Branch])
def test_wrong_types_are_sentences(cls):
    """Every option with everything, alone and in random company: taken, or a ValueError."""
    names = [field.name for field in fields(cls)]
    base = {"layers": "mid"} if cls is Branch else {}
    refused = dict.fromkeys(names, 0)
    source = random.Random(0)

    def attempt(options):
        try:
            made = cls(**{**base, **options})
        except ValueError as error:
            assert len(str(error).split()) > 4 and "ambiguous" not in str(error), error
            return False
        if not any(callable(value) for value in options.values()):
            assert copy.deepcopy(made) is made and pickle.loads(pickle.dumps(made)) == made
        return True

    for name in names:
        for value in _JUNK:
            refused[name] += not attempt({name: value})
    for _ in range(500):
        attempt({name: source.choice(_JUNK) for name in source.sample(names, min(3, len(names)))})
    # no option takes everything
    assert all(count > len(_JUNK) // 3 for count in refused.values()), refused


# ---- pickles ----


def _module_level(step):
    return 0.5


def test_settings_that_cannot_be_pickled_say_which():
    config = PatchConfig("mid", schedule=Schedule(per_step=lambda step: 1.0))
    for settings, message in (
        (config, r"^schedule: per_step=.*cannot be pickled"),
        (config.schedule, r"^per_step=<function .*lambda.* cannot be pickled"),
        (PatchConfig(branches=[Branch("mid")], schedule=config.schedule), "^schedule: per_step="),
    ):
        with pytest.raises(ValueError, match=message):
            pickle.dumps(settings)
    # copies need no pickle
    assert copy.deepcopy(config).schedule is config.schedule and copy.copy(config) == config


def test_other_settings_come_back_as_they_were():
    for config in (
        PatchConfig("mid", schedule=Schedule(per_step=_module_level), reuse=Reuse(every=2)),
        PatchConfig(branches=[Branch("mid", SoftIdentity([0.5, 1])), Branch("up", "noise", 2)]),
        PatchConfig(compile=CompileConfig(regional=True), rescale_mode="cfg", rescale=0.5),
    ):
        assert pickle.loads(pickle.dumps(config)) == config


def test_numpy_scales_make_the_same_picture():
    """A PAG scale of another number type is no other schedule, nor another graph."""
    name = "StableDiffusionPAGPipeline"
    pipe = build(name)
    pag_fast.patch(pipe, schedule=Schedule(adaptive=0.001))
    wanted = latents(pipe, call_kwargs(name, pipe))
    pag_fast.patch(pipe, schedule=Schedule(adaptive=torch.tensor(0.001, dtype=torch.float64)))
    assert torch.equal(latents(pipe, call_kwargs(name, pipe)), wanted)
