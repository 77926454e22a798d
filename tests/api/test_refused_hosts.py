"""Hosts that can't be compiled as they are: the error says what to pass instead."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from compiler_hosts import Mlp, rows
from torch import nn

import morphc
from morphc.errors import AlreadyMorphedError, ConfigError, UnknownNameError, UnsupportedHostError

FEW = morphc.Config(seeds_per_layer=2)


@pytest.fixture
def group(tmp_path: Path):
    """A process group of one, over a file."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    gc.collect()  # a wrapped host ends before its group: torch may wait for ever the other way round
    dist.destroy_process_group()


def refused(host: object, error: type[Exception] = UnsupportedHostError) -> str:
    with pytest.raises(error) as caught:
        morphc.compile(host, (rows(),), config=FEW)
    return str(caught.value)


class TestHosts:
    def test_a_compiled_one_names_its_original(self):
        text = refused(torch.compile(Mlp()))
        assert "model._orig_mod" in text
        assert "torch.compile what morphc.compile returns" in text

    def test_a_compiled_child_is_named(self):
        text = refused(nn.Sequential(nn.Linear(8, 8), torch.compile(Mlp())))
        assert text.startswith("'1' went through torch.compile already: put its _orig_mod back")

    def test_one_compiled_in_place_is_to_be_set_back(self):
        host = Mlp()
        host.compile()
        text = refused(host)
        assert text.startswith(
            "this model was compiled in place, by its compile(): set its _compiled_call_impl to None"
        )
        assert refused(nn.Sequential(nn.Linear(8, 8), host)).startswith("'1' was compiled in place")
        host._compiled_call_impl = None
        model = morphc.compile(host, (rows(),), config=FEW)
        model.compile(backend="eager")
        assert "morphc.detach(model)" in refused(model, AlreadyMorphedError)

    def test_one_wrapped_in_ddp_names_its_module(self, group):
        text = refused(nn.parallel.DistributedDataParallel(Mlp()))
        assert "wrapped in DistributedDataParallel: pass model.module, and wrap what" in text

    def test_one_wrapped_in_data_parallel_names_its_module(self):
        assert "wrapped in DataParallel: pass model.module" in refused(nn.DataParallel(Mlp()))

    def test_a_wrapped_child_is_named(self):
        text = refused(nn.Sequential(nn.Linear(8, 8), nn.DataParallel(nn.Linear(8, 8))))
        assert "pass the module inside '1'" in text

    def test_a_class_of_the_users_own_with_such_a_name_is_fine(self):
        class DataParallel(nn.Sequential):
            pass

        assert len(morphc.seeds(morphc.compile(DataParallel(nn.Linear(8, 4)), (rows(),), config=FEW))) == 2

    @pytest.mark.parametrize("make", [Mlp, lambda: nn.Linear(8, 4), lambda: nn.Sequential(nn.Linear(8, 4))])
    def test_a_morphed_one_offers_detach(self, make):
        model = morphc.compile(make(), (rows(),), config=FEW)
        assert "morphc.detach(model)" in refused(model, AlreadyMorphedError)
        assert "morphc.detach(model)" in refused(nn.Sequential(model), AlreadyMorphedError)
        assert morphc.compile(morphc.detach(model), (rows(),), config=FEW)(rows()).shape == (3, 4)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_torchscript_names_the_module_it_came_from(self):
        assert "scripted from" in refused(torch.jit.script(nn.Linear(8, 4)))
        assert "scripted from" in refused(torch.jit.trace(nn.Linear(8, 4), rows()))

    def test_a_lazy_one_is_to_be_run_once(self):
        host = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2))
        text = refused(host)
        assert "'0.weight' is lazy and has no shape yet (4 of them): run the model once" in text
        host(rows())
        assert len(morphc.seeds(morphc.compile(host, (rows(),), config=FEW))) == 4

    @pytest.mark.parametrize("host", [None, 3, "model.py", nn.Linear, torch.ones(2), lambda x: x])
    def test_what_is_no_module(self, host):
        assert refused(host) == f"morphc.compile takes an nn.Module, not {type(host).__name__}"

    def test_every_refusal_is_a_morphc_error_and_a_type_error(self):
        assert issubclass(AlreadyMorphedError, UnsupportedHostError)
        assert issubclass(UnsupportedHostError, TypeError)
        assert issubclass(UnsupportedHostError, morphc.errors.MorphcError)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"seeds_per_layer": 0}, "seeds_per_layer=0"),
            ({"seeds_per_layer": -3}, "seeds_per_layer=-3"),
            ({"seeds_per_layer": True}, "seeds_per_layer=True"),
            ({"seeds_per_layer": {"fc1": 0}}, "seeds_per_layer['fc1']=0"),
            ({"slots": 0}, "slots=0"),
            ({"rank": 0}, "rank=0"),
            ({"telemetry_every": -1}, "telemetry_every=-1"),
            ({"telemetry_values": -1}, "telemetry_values=-1"),
            ({"max_overhead": 2.0}, "max_overhead=2.0"),
            ({"blueprint": ()}, "blueprint=() names none"),
        ],
    )
    def test_a_bad_value_names_option_and_value(self, options, words):
        with pytest.raises(ConfigError) as caught:
            morphc.Config(**options)
        assert words in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"kinds": ("liner",)}, "Did you mean 'linear'?"),
            ({"blend": "residul"}, "Did you mean 'residual'?"),
            ({"backend": "tritn"}, "Did you mean 'triton'?"),
        ],
    )
    def test_an_unknown_name_gets_a_suggestion(self, options, words):
        with pytest.raises(UnknownNameError) as caught:
            morphc.Config(**options)
        assert words in str(caught.value)

    def test_an_unknown_blueprint_gets_a_suggestion(self):
        with pytest.raises(UnknownNameError, match="Did you mean 'bottleneck'"):
            morphc.compile(Mlp(), (rows(),), config=morphc.Config(blueprint="bottlenck"))

    def test_a_strict_pattern_that_asks_too_much_names_the_site(self):
        with pytest.raises(ConfigError, match=r"is more than the 4 features of 'fc2'"):
            morphc.compile(Mlp(), (rows(),), config=morphc.Config(seeds_per_layer={"*": 2, "fc2": 9}))

    def test_a_pattern_that_matches_nothing_is_refused(self):
        with pytest.raises(ConfigError, match=r"seeds_per_layer\['fc3'\] matches no site. Did you mean"):
            morphc.compile(Mlp(), (rows(),), config=morphc.Config(seeds_per_layer={"fc3": 2, "fc1": 2}))

    def test_a_config_comes_back_from_its_json(self):
        config = morphc.Config(seeds_per_layer={"*": 2}, kinds=("conv",), blueprint=("affine", "bottleneck"))
        assert morphc.Config.from_json(config.to_json()) == config
        with pytest.raises(ConfigError, match="not a morphc config"):
            morphc.Config.from_json(b'{"rnak": 3}')
