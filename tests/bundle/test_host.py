import pytest
import torch

from jitexport.bundle.host import check_host, fingerprint
from jitexport.errors import HostMismatchError

HERE = fingerprint(torch.device("cpu"))
FIELDS = ("system", "machine", "cpu", "torch", "device", "gpu")


def test_this_machine_fits_itself():
    check_host(HERE, HERE, FIELDS)
    assert HERE.device == "cpu" and HERE.cuda is None and HERE.gpu is None and HERE.torch == torch.__version__


@pytest.mark.parametrize("field", ["system", "machine", "torch", "device", "gpu"], ids="field-{}".format)
def test_every_field_that_matters_is_compared_and_named(field):
    other = HERE.model_copy(update={field: "another"})
    with pytest.raises(HostMismatchError, match=f"{field} another"):
        check_host(other, HERE, FIELDS)
    check_host(other, HERE, [f for f in FIELDS if f != field])


def test_all_differences_are_named_at_once():
    with pytest.raises(HostMismatchError, match=r"system Plan9; torch 1\.0"):
        check_host(HERE.model_copy(update={"system": "Plan9", "torch": "1.0"}), HERE, FIELDS)


def test_a_cpu_may_have_more_instruction_sets_but_not_fewer():
    rich = HERE.model_copy(update={"cpu_features": (*HERE.cpu_features, "avx1024")})
    check_host(HERE, rich, FIELDS)
    with pytest.raises(HostMismatchError, match="without avx1024"):
        check_host(rich, HERE, FIELDS)


def test_another_number_of_threads_is_nothing_to_say(caplog):
    """Engines run on as many as there are."""
    assert HERE.threads == torch.get_num_threads()
    check_host(HERE.model_copy(update={"threads": 57}), HERE, FIELDS)
    assert not caplog.records
