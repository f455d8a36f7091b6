"""Methods: named objectives with their formula, source and conversions from published conventions.

Notation: z student's logits, z_k teacher k's, y label, q = softmax(z / T), P_k = softmax(z_k / T), C classes.
All terms are means over the batch of sums over classes (`batchmean`), in nats.
"""

from coursepack.distill.methods.base import Evidence, Method, from_mean_reduction
from coursepack.distill.methods.features import FEATURES
from coursepack.distill.methods.logits import LOGITS
from coursepack.distill.methods.peers import PEERS
from coursepack.distill.methods.relations import RELATIONS
from coursepack.distill.methods.teams import TEAMS

METHODS: dict[str, Method] = {**LOGITS, **TEAMS, **RELATIONS, **FEATURES, **PEERS}
"""Methods by name. To add one, add a row to the table of its family."""

__all__ = ["METHODS", "Evidence", "Method", "from_mean_reduction"]
