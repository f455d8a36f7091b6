"""Loss terms, fusions and exchanges: the contract of all."""

from dataclasses import replace

import contracts_exchanges as exchanges
import contracts_terms as contract
import pytest
from torch import nn

from coursepack.distill.exchange import EXCHANGES
from coursepack.distill.exchange.base import Exchanged
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


class Undetached(nn.Module):
    """An exchange through which a student's loss trains the others, and that does not say so."""

    def forward(self, inputs):
        logits = [output.logits for output in inputs.outputs]
        return Exchanged(tuple((logits[index - 1],) for index in range(len(logits))))


def test_the_contract_sees_gradients_that_are_not_declared(monkeypatch):
    row = EXCHANGES["outputs"]
    monkeypatch.setitem(EXCHANGES, "outputs", replace(row, build=lambda _config, _context: Undetached()))
    with pytest.raises(AssertionError, match="student 2"):
        exchanges.check_gradients("outputs")
