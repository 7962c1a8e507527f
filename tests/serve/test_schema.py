"""Requests: whatever arrives is a request or an error, and nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitexport.serve import schema
from jitexport.serve.catalog import Catalog, Entry
from jitexport.serve.errors import ApiError
from jitexport.serve.settings import Limits

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from([*schema.ImageRequest.model_fields, *schema.ENVELOPES]) | st.text(max_size=10)


@pytest.fixture(scope="module")
def catalog(quad, single):
    return Catalog([Entry.read("quad", quad), Entry.read("single", single)])


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_bytes(body):
    with pytest.raises(ApiError) as refused:
        schema.parse(body)
    assert refused.value.status == 400
    json.dumps(refused.value.body()).encode()


@given(fields=st.dictionaries(NAMES, VALUES, max_size=4), prompt=st.text(max_size=10))
def test_any_fields(catalog, fields, prompt):
    try:
        asked = schema.parse(json.dumps({"prompt": prompt} | fields).encode())
        entry = schema.choose(asked, catalog)
        jobs = schema.jobs(asked, entry, [], Limits())
    except ApiError as error:
        assert error.status in (400, 404) and error.message
        json.dumps(error.body()).encode()
        return
    assert len(jobs) == (asked.n or 1) and all(job.prompt == asked.prompt for job in jobs)


def test_without_a_name_the_first_bundle_of_a_size_is_taken(catalog):
    def chosen(**fields):
        return schema.choose(schema.ImageRequest(prompt="a", **fields), catalog).name

    assert chosen() == chosen(size="auto") == chosen(size="32x48") == "quad"
    assert chosen(model="single") == chosen(model="single", size="32x48") == "single"


def test_seeds_are_drawn_where_none_is_given(catalog):
    asked = schema.ImageRequest(prompt="a", n=2)
    drawn = [[j.seed for j in schema.jobs(asked, catalog["quad"], [], Limits())] for _ in range(5)]
    assert all(b == a + 1 for a, b in drawn) and len({a for a, _ in drawn}) == 5


def test_jobs_that_differ_in_weights_or_guidance_are_never_together(catalog):
    def key(**fields):
        asked = schema.ImageRequest(prompt="a", **fields)
        return schema.jobs(asked, catalog["quad"], ["one", "two"], Limits())[0].together

    keys = [
        key(), key(lora="one"), key(lora="two"), key(lora="one", lora_scale=0.5), key(guidance_scale=2.0),
        key(negative_prompt="b", true_cfg_scale=2.0), key(negative_prompt="b", true_cfg_scale=3.0),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key(seed=1) == key(seed=2, output_format="jpeg")
    assert key(negative_prompt="b", true_cfg_scale=2.0) == key(negative_prompt="c", true_cfg_scale=2.0)
