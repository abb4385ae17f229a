"""SetToSet: FEAT's transformer, which adapts the class prototypes of an episode to each other."""

import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, check_at_least_one
from pml_fewshot.embedders.modes import in_float32


class SetToSet(nn.Module):
    """Adapts the prototypes of an episode to each other with one attention layer; the context of FEAT.

    Each prototype attends to all W of its episode. The result goes through a linear layer and is added to it, followed
    by layer norm, which leaves a prototype with a norm near sqrt(D). Queries are not changed. The order of classes and
    shots does not matter.

    Args:
        dim: dimensions D of the embeddings.
        heads: number of attention heads; each is D wide, as in the authors' code. One as in the paper.
        dropout: dropout rate of the term added to the prototypes.
        attention_dropout: dropout rate of the attention weights. Both use torch's global generator, which a run seeds.

    Shapes: support (E, W, K, D) and query (E, N, D) -> prototypes (E, W, 1, D) and the same queries.

    Weights have the names and initial scales of the authors' code, whose files load once "slf_attn." is removed from
    their names. Squared distances to such prototypes are about 2 D, so the authors divide logits by 32 or 64 (the
    loss's scale), start from a classification-trained embedder, and train this part at 10 times the embedder's rate.
    Their auxiliary contrastive loss over support and queries is left out.

    Source: Ye, Hu, Zhan and Sha 2020, "Few-Shot Learning via Embedding Adaptation with Set-to-Set Functions", section
    3.3; defaults are those of the authors' code.
    """

    def __init__(self, dim: int, heads: int = 1, dropout: float = 0.5, attention_dropout: float = 0.1) -> None:
        super().__init__()
        check_at_least_one("dim", dim)
        check_at_least_one("heads", heads)
        for name, share in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            if not 0 <= share < 1:
                raise UsageError(f"expected {name} of at least 0 and below 1, got {share}; give a share")
        self.dim, self.heads, self.attention_dropout = dim, heads, attention_dropout
        self.w_qs, self.w_ks, self.w_vs = (nn.Linear(dim, heads * dim, bias=False) for _ in range(3))
        self.fc = nn.Linear(heads * dim, dim)
        self.layer_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        for each in (self.w_qs, self.w_ks, self.w_vs):
            nn.init.normal_(each.weight, std=dim**-0.5)
        nn.init.xavier_normal_(self.fc.weight)

    @in_float32
    def forward(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        if support.ndim != 4 or support.shape[3] != self.dim:
            got = f"shape {tuple(support.shape)}"
            raise UsageError(f"expected a support of shape (E, W, K, {self.dim}), got {got}; set dim to theirs")
        prototypes = support.mean(dim=2)  # (E, W, D)
        asked, keys, values = (
            linear(prototypes).unflatten(2, (self.heads, self.dim)).transpose(1, 2)  # (E, heads, W, D)
            for linear in (self.w_qs, self.w_ks, self.w_vs)
        )
        share = self.attention_dropout if self.training else 0.0
        read = F.scaled_dot_product_attention(asked, keys, values, dropout_p=share).transpose(1, 2).flatten(2)
        return self.layer_norm(prototypes + self.dropout(self.fc(read))).unsqueeze(2), query
