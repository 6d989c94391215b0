"""The delta rule with decay, in a form that covers its variants.

    S'_t = diag(exp(log_decay_t)) S_{t-1}
    S_t  = S'_t + (beta_t * k_t) (v_t - S'_t^T e_t)^T
    o_t  = scale * S_t^T q_t

A token erases the value that the decayed state returns for its erase key e, and writes v under k. With e = k it is
DeltaNet (arXiv 2406.06484) without decay, Gated DeltaNet (2412.06464, equation 10) with one decay per head and Kimi
Delta Attention (2510.26692, equation 1) with one per channel; RWKV-7 (2503.14456, equation 16) erases under another
key than it writes. The chunked form solves for the values that are written, v_t - S'_t^T e_t, as the WY representation
does (2406.06484, section 3.2).

Shapes: B batch, T tokens, H query heads, J key/value heads (H = J * G, head h reads state h // G), K key dim, V value
dim. The state is [B, J, K, V], float32 (float64 for float64 inputs).

`delta_rule_naive` is the definition, `delta_rule_chunked` the fast version; `delta_rule` chooses.
"""

from typing import Any

import torch
from torch import Tensor

from linearize.ops.chunks import chunks, grouped, segment_chunks, segment_masks, state_dtype, unchunked
from linearize.ops.dispatch import run_kernel
from linearize.ops.gla import CHUNK, DecayedScores

# tokens per chunk with one decay per head
SCALAR_CHUNK = 64


def delta_rule_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    erase: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence as a loop over tokens.

    Args:
        q: [B, T, H, K]. k: [B, T, J, K]. v: [B, T, J, V].
        beta: [B, T, J, 1], or beside an erase key [B, T, J, K].
        log_decay: [B, T, J, K] per channel or [B, T, J, 1] per head, at most zero; None forgets nothing.
        erase: e, [B, T, J, K]; k when absent.
        initial_state: [B, J, K, V], zero when absent.
        segments: [B, T] document number of each token; the state is zeroed where it changes.

    Returns:
        output [B, T, H, V] in v's dtype, final state [B, J, K, V].
    """
    dtype = state_dtype(q)
    q_, k_, v_, beta_, e_ = (x.to(dtype) for x in (grouped(q, k), k, v, beta, k if erase is None else erase))
    (B, T, J, K), V = k.shape, v.shape[-1]
    state = q_.new_zeros(B, J, K, V) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        if segments is not None and t > 0:
            state = state * (segments[:, t] == segments[:, t - 1]).to(dtype)[:, None, None, None]
        if log_decay is not None:
            state = state * log_decay[:, t].to(dtype).exp().unsqueeze(-1)
        written = v_[:, t] - torch.einsum("bjk,bjkv->bjv", e_[:, t], state)
        state = state + (beta_[:, t] * k_[:, t]).unsqueeze(-1) * written[:, :, None]
        outputs.append(scale * torch.einsum("bjgk,bjkv->bjgv", q_[:, t], state))
    output = torch.stack(outputs, dim=1) if T else q_.new_zeros(B, 0, J, q_.shape[3], V)
    return output.flatten(2, 3).to(v.dtype), state


def delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    erase: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the same as `delta_rule_naive`, chunk by chunk."""
    dtype, T, (B, _, J, K), V = state_dtype(q), q.shape[1], k.shape, v.shape[-1]
    state = q.new_zeros(B, J, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if T == 0:
        return v.new_zeros(B, 0, q.shape[2], V), state
    per_channel = log_decay is not None and log_decay.shape[-1] > 1
    size = CHUNK if per_channel else SCALAR_CHUNK
    # row 0 of the group erases, the others read
    rows = torch.cat([(k if erase is None else erase).to(dtype).unsqueeze(3), grouped(q, k).to(dtype) * scale], dim=3)
    rows, k_, v_ = (chunks(x.to(dtype), size) for x in (rows, beta.to(dtype) * k, v))
    b = k_.new_zeros(1, 1, 1, size, 1) if log_decay is None else chunks(log_decay.to(dtype), size).cumsum(3)
    output, final = _delta_chunks(rows, k_, v_, b, state, segment_chunks(segments, size), per_channel)
    return unchunked(output, T).to(v.dtype), final


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    erase: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the same as `delta_rule_naive`, by fla's kernel where that can serve these inputs, else in chunks.

    Autocast is off inside, so that the state stays float32.

    Returns:
        output [B, T, H, V] in v's dtype, final state [B, J, K, V].
    """
    keywords: dict[str, Any] = {"scale": scale, "initial_state": initial_state, "segments": segments}
    decay = torch.zeros_like(beta) if log_decay is None else log_decay
    with torch.autocast(q.device.type, enabled=False):
        if erase is not None:
            # this kernel reads the undecayed state under its third input and subtracts the result under its fourth
            result = run_kernel(
                "fla.ops.generalized_delta_rule",
                "chunk_dplr_delta_rule",
                q,
                lambda: [beta * k, v, -erase * decay.exp(), beta * k, decay.expand_as(k)],
                **keywords,
            )
        elif decay.shape[-1] > 1:
            result = run_kernel("fla.ops.kda", "chunk_kda", q, lambda: [k, v, decay, beta.squeeze(-1)], **keywords)
        else:  # without decay too, since fla's chunk_delta_rule takes no float32
            result = run_kernel(
                "fla.ops.gated_delta_rule",
                "chunk_gated_delta_rule",
                q,
                lambda: [k, v, decay.squeeze(-1), beta.squeeze(-1)],
                **keywords,
            )
        if result is None:  # no kernel for these inputs
            return delta_rule_chunked(q, k, v, beta, log_decay, erase=erase, **keywords)
        output, state = result
        return output.to(v.dtype), state


def _delta_chunks(
    rows: Tensor, k: Tensor, v: Tensor, b: Tensor, state: Tensor, segments: Tensor | None, per_channel: bool
) -> tuple[Tensor, Tensor]:
    """Compute the delta rule over chunks.

    Args:
        rows: erase keys and, behind them, the queries of the group: [B, J, N, C, 1 + G, K].
        k, v: beta k and v, [B, J, N, C, ·].
        b: cumulative log-decays, [B, J, N, C, K or 1].
        state: S_0, [B, J, K, V].
        segments: [B, 1, N, C] or None.
        per_channel: b has one column per channel.

    Returns:
        output [B, J, N, C, G, V], final state.
    """
    C = k.shape[3]
    masks = segment_masks(segments, k.dtype)
    if per_channel:
        scores = DecayedScores.apply(rows.contiguous(), k, b)
    else:
        later = torch.ones(C, C, dtype=torch.bool, device=k.device).triu(1)
        decay = (b - b.transpose(-1, -2)).masked_fill(later, float("-inf")).exp()
        scores = (rows.flatten(3, 4) @ k.transpose(-1, -2)).unflatten(3, rows.shape[3:5]) * decay[..., :, None, :]
    from_state, to_state, across = b.exp(), (b[..., -1:, :] - b).exp(), b[..., -1, :].exp().unsqueeze(-1)
    if masks is not None:
        scores = scores * masks.same[..., None, :]
        from_state, to_state = from_state * masks.keep_in[..., None], to_state * masks.keep_out[..., None]
        across = across * masks.carry[..., None, None]
    rows = rows * from_state[..., None, :]

    # (1 + erased) written = v - (erase keys) S_n, a unit lower triangular system
    erased = scores[..., 0, :].tril(-1)
    solved = torch.linalg.solve_triangular(
        erased, torch.cat([v, rows[..., 0, :]], dim=-1), upper=False, unitriangular=True
    )
    values, keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    writes = (k * to_state).transpose(-1, -2)
    across = across.expand(*k.shape[:3], -1, 1)
    # each chunk is an affine map of the state: S_{n+1} = (across - writes keys) S_n + writes values
    channel_decays = across.squeeze(-1).expand(*k.shape[:3], k.shape[-1])
    transition = torch.diag_embed(channel_decays) - writes @ keys
    increment = writes @ values
    entering = []
    for T_n, I_n in zip(transition.unbind(2), increment.unbind(2)):
        entering.append(state)
        state = torch.baddbmm(I_n.flatten(0, 1), T_n.flatten(0, 1), state.flatten(0, 1)).view_as(state)
    states = torch.stack(entering, dim=2)
    written = values - keys @ states
    queries = rows[..., 1:, :]
    output = scores[..., 1:, :].flatten(3, 4) @ written + queries.flatten(3, 4) @ states
    return output.unflatten(3, queries.shape[3:5]), state
