"""EarthMoversDistance: the similarity of two feature maps by the best matching of their nodes (DeepEMD)."""

import torch
from torch import Tensor

from pml_fewshot.distances.episodic_distance import EpisodicDistance
from pml_fewshot.distances.nodes import as_maps, check_nodes, in_blocks, unit_nodes
from pml_fewshot.distances.optimal_transport import EPSILON, Solver, check_solver, transport_value
from pml_fewshot.embedders.modes import in_float32

LEAST_WEIGHT = 1e-3  # of a node unrelated to the other image, as in the authors' code


class EarthMoversDistance(EpisodicDistance):
    """Scores two feature maps by the cosines of their nodes under the cheapest matching of one to the other.

    A node's mass measures how related it is to the other image: its dot product with the mean node of the other,
    clipped at 0, plus 0.001, scaled to a sum of 1. Moving a unit from node i to node j costs 1 - the cosine of the two,
    each centered over its channels. The score is 1 - the earth mover's distance: the cosine averaged over the matching,
    from -1 to 1.

    A similarity (`is_inverted=True`) for losses, heads and miners of PML. It is bounded, so a softmax over it needs a
    scale: `PrototypicalLoss(distance=EarthMoversDistance(25), scale=12.5)` has the paper's temperature. Comparing all
    pairs of a set takes 75 us per pair at 25 nodes on two cores, 11 minutes for 3,000 images; `RetrievalTester` instead
    reranks the first k with it.

    Args:
        nodes: positions of the feature map: 25 for Conv4 and for ResNet12(pool=False) at 84 x 84.
        solver: "exact", by POT (the extra `emd`), on the CPU; "sinkhorn", entropic, on the embeddings' device; "auto",
            exact on a CPU and sinkhorn on a GPU. See `transport_value`.
        epsilon: of sinkhorn. The default is within 1 % of the exact distance, except for maps that are only 1 to 2 %
            active (5 % seen); 0.0005 is within 0.01 % for most maps.
        collect_stats: keep PML's statistics for a record-keeper; PML's own default when None.

    Shapes: (B, D) and (R, D) -> (B, R), where D is channels * nodes, channels first.

    The exact solver's gradient is exact, through the masses too: the matching for the costs, the dual potentials for
    the masses (the paper's code differentiates the optimality conditions of a regularized problem, or leaves out the
    masses). Sinkhorn's is that of its entropic problem.

    Raises:
        UsageError: fewer than 2 nodes; nodes that do not divide D; an epsilon too small for the embeddings' type.
        MissingPackageError: the solver is exact, or auto without a GPU, and POT is not installed.

    Source: Zhang, Cai, Lin and Shen 2020, "DeepEMD: Few-Shot Image Classification with Differentiable Earth Mover's
    Distance and Structured Classifiers", equations 1 to 9.
    """

    span = 2.0
    ranks_all = False

    def __init__(
        self, nodes: int, solver: Solver = "auto", epsilon: float = EPSILON, collect_stats: bool | None = None
    ) -> None:
        super().__init__(normalize_embeddings=False, is_inverted=True, collect_stats=collect_stats)
        check_nodes(nodes)
        check_solver(solver, epsilon)
        self.nodes, self.solver, self.epsilon = nodes, solver, epsilon
        self.add_to_recordable_attributes(list_of_names=["nodes", "epsilon"], is_stat=False)

    def extra_repr(self) -> str:
        return f"{self.nodes} nodes, {self.solver}" + (f", epsilon={self.epsilon}" if self.solver == "sinkhorn" else "")

    @in_float32
    def compute_batch(self, query: Tensor, reference: Tensor) -> Tensor:
        """Scores each query (E, N, D) against each reference (E, R, D) of its episode: (E, N, R)."""
        maps = as_maps(query, self.nodes), as_maps(reference, self.nodes)
        if torch.is_grad_enabled() and (query.requires_grad or reference.requires_grad):
            return self._scores(*maps)
        return in_blocks(self._scores, *maps, floats_of_pair=self.nodes**2)

    def _scores(self, queries: Tensor, references: Tensor) -> Tensor:
        """(E, N, n, C) and (E, R, n, C) -> (E, N, R)"""
        # the mass of each node of one side for each item of the other: (E, N, n, R) and (E, R, n, N)
        of_query = torch.einsum("enic,erc->enri", queries, references.mean(dim=2))
        of_reference = torch.einsum("eric,enc->enri", references, queries.mean(dim=2))
        directions = (unit_nodes(maps - maps.mean(dim=3, keepdim=True)) for maps in (queries, references))
        cosines = torch.einsum("enic,erjc->enrij", *directions)
        a, b = (side.flatten(0, 2).relu() + LEAST_WEIGHT for side in (of_query, of_reference))
        value = transport_value(1 - cosines.flatten(0, 2), a, b, self.solver, self.epsilon)
        return 1 - value.unflatten(0, cosines.shape[:3])
