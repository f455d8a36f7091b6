"""Loss terms, fusions and exchanges: the contract of all."""

import contracts_exchanges as exchanges
import contracts_terms as contract
import pytest

from coursepack.distill.exchange import EXCHANGES
from coursepack.distill.fusion import FUSIONS
from coursepack.distill.losses import LOSSES


@pytest.mark.parametrize("name", LOSSES)
def test_term(name):
    contract.check_term(name)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_a_term_are_independent_or_declared(name):
    contract.check_rows(name)


@pytest.mark.parametrize("name", FUSIONS)
def test_fusion(name):
    contract.check_fusion(name)


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("check", ["exchange", "gradients", "rows", "state"])
def test_exchange(name, check):
    getattr(exchanges, f"check_{check}")(name)
