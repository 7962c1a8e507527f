import importlib

import pytest

from jitexport import registry
from jitexport.backends.base import Backend
from jitexport.errors import UnknownNameError
from jitexport.methods.base import Method
from jitexport.models.base import ModelAdapter
from jitexport.models.sources import ModelSource, published


@pytest.mark.parametrize("name", registry.METHODS)
def test_methods(name):
    method = registry.method(name)
    assert issubclass(method, Method) and method.name == name
    assert all("timesteps" in method.options(preset) for preset in method.presets)


@pytest.mark.parametrize("name", ["eager", "aoti"])
def test_backends(name):
    backend = registry.backend(name)
    assert isinstance(backend, Backend) and backend.name == name and backend.summary


def test_every_registered_name_leads_somewhere():
    adapters = [family.adapter for family in registry.FAMILIES.values()]
    for target in (*adapters, *registry.METHODS.values()):
        module, attribute = target.split(":")
        assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", registry.FAMILIES)
def test_families_serve_the_pipeline_class_they_are_listed_under(name):
    family = registry.family(name)
    assert issubclass(family, ModelAdapter) and family.family == name
    assert set(family.published) == set(registry.FAMILIES[name].models)


@pytest.mark.parametrize("name", registry.MODELS)
def test_models_describe_themselves_by_the_name_they_are_listed_under(name):
    source = published(name)
    assert isinstance(source, ModelSource) and source.name == name


@pytest.mark.parametrize("find", [registry.method, registry.backend, registry.family, registry.family_of])
def test_unknown_names_are_answered_with_the_known_ones(find):
    with pytest.raises(UnknownNameError, match="unknown") as caught:
        find("nonesuch")
    assert caught.value.found == "nonesuch" and caught.value.expected.startswith("one of: ")
