"""
The scan by mamba_ssm's kernels, with dt = 1 in the path of the inputs.

Those kernels scale their input by the same dt that multiplies A in the decay, so a free decay needs either a division of
the input by dt, which loses accuracy where a_t is near 1, or this: decays summed with dt = -log a and A = -1, and ones
in place of dt everywhere else. That takes the package's inner functions, hence one version of it: 2.3.2.post1.

Shape letters: B batch, T tokens, H heads, P head dim, N state, Q tokens of a chunk, C chunks.
"""

import torch


try:
    from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_bwd, _bmm_chunk_fwd
    from mamba_ssm.ops.triton.ssd_chunk_scan import (
        _chunk_scan_bwd_dC,
        _chunk_scan_bwd_dcb,
        _chunk_scan_bwd_ddAcs_stable,
        _chunk_scan_bwd_dstates,
        _chunk_scan_fwd,
    )
    from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_cumsum_fwd, _chunk_state_bwd_db, _chunk_state_fwd
    from mamba_ssm.ops.triton.ssd_combined import _chunk_scan_chunk_state_bwd_dx
    from mamba_ssm.ops.triton.ssd_state_passing import _state_passing_bwd, _state_passing_fwd

    AVAILABLE = True
except ImportError:
    AVAILABLE = False


def ssd_mamba(x, log_a, B, C, initial_state=None, seq_idx=None, chunk_size: int = 128):
    """[`ssd`] by mamba_ssm's kernels; raises `ValueError` where they are missing or a tensor is not on CUDA."""
    if not AVAILABLE:
        raise ValueError(
            "ssm_backend='mamba_ssm' needs the package mamba-ssm, and of it the inner functions of version 2.3.2.post1. "
            "Install that, or set ssm_backend to 'auto', whose kernels need triton only."
        )
    if not x.is_cuda:
        raise ValueError(f"ssm_backend='mamba_ssm' works on CUDA tensors; these are on {x.device}. Use 'auto'.")
    if seq_idx is not None:
        seq_idx = seq_idx.to(torch.int32).contiguous()
    x, B, C = (t.contiguous() for t in (x, B.to(x.dtype), C.to(x.dtype)))
    return _UnitStep.apply(x, log_a.float(), B, C, initial_state, seq_idx, chunk_size)


def _states(x, B, sums, ones, initial_state, seq_idx, chunk_size, dtype):
    """The states before each chunk `[B, C, H, P, N]`, and the last one `[B, H, P, N]`, float32."""
    local = _chunk_state_fwd(B, x, ones, sums, seq_idx=seq_idx, states_in_fp32=True)
    states, last = _state_passing_fwd(
        local.flatten(3),
        sums[..., -1],
        initial_states=None if initial_state is None else initial_state.flatten(2),
        seq_idx=seq_idx,
        chunk_size=chunk_size,
        out_dtype=dtype,
    )
    return states.unflatten(3, local.shape[3:]), last.unflatten(2, local.shape[3:])


class _UnitStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_a, B, C, initial_state, seq_idx, chunk_size):
        minus = -torch.ones(x.shape[2], device=x.device)
        sums, steps = _chunk_cumsum_fwd((-log_a).contiguous(), minus, chunk_size)  # [B, H, C, Q]
        ones = torch.ones_like(steps)
        states, last = _states(x, B, sums, ones, initial_state, seq_idx, chunk_size, C.dtype)
        scores = _bmm_chunk_fwd(C, B, chunk_size, seq_idx=seq_idx, output_dtype=torch.float32)
        y, _ = _chunk_scan_fwd(scores, x, ones, sums, C, states, seq_idx=seq_idx)
        ctx.save_for_backward(x, B, C, sums, initial_state, seq_idx)
        ctx.chunk_size = chunk_size
        return y, last

    @staticmethod
    def backward(ctx, dy, dlast):
        x, B, C, sums, initial_state, seq_idx = ctx.saved_tensors
        chunk_size, groups = ctx.chunk_size, B.shape[2]
        dy = dy.contiguous()
        ones = torch.ones_like(sums)
        scores = _bmm_chunk_fwd(C, B, chunk_size, seq_idx=seq_idx, output_dtype=torch.float32)
        states, _ = _states(x, B, sums, ones, initial_state, seq_idx, chunk_size, torch.float32)
        dstates = _chunk_scan_bwd_dstates(C, sums, dy, seq_idx=seq_idx, dtype=torch.float32)
        dstates, dpassing, dinitial, states_cast = _state_passing_bwd(
            states.flatten(3),
            sums[..., -1],
            dstates.flatten(3),
            dfinal_states=dlast.float().flatten(2).contiguous(),
            seq_idx=seq_idx,
            has_initial_states=initial_state is not None,
            dstates_dtype=x.dtype,
            states_dtype=x.dtype,
            chunk_size=chunk_size,
        )
        dstates, states_cast = (t.unflatten(3, states.shape[3:]) for t in (dstates, states_cast))
        dx, _, _ = _chunk_scan_chunk_state_bwd_dx(x, ones, sums, B, scores, dy, dstates, seq_idx=seq_idx)
        dB, da_next = _chunk_state_bwd_db(x, ones, sums, dstates, seq_idx=seq_idx, B=B, ngroups=groups)
        dC, da_before = _chunk_scan_bwd_dC(states_cast, sums, dy, seq_idx=seq_idx, C=C, ngroups=groups)
        dscores = _chunk_scan_bwd_dcb(x, ones, sums, dy, seq_idx=seq_idx, ngroups=groups).to(scores.dtype)
        into_B, into_C = torch.empty_like(B), torch.empty_like(C)
        _bmm_chunk_bwd(C, dscores, residual=dB, out=into_B)
        _bmm_chunk_bwd(B, dscores.transpose(-1, -2), residual=dC, out=into_C)
        # What a decay inside the chunk, from the chunk's start and to its end passes on: [B, H, C, Q].
        da_before[..., -1] += dpassing
        da = _chunk_scan_bwd_ddAcs_stable(x, ones, sums, dy, scores)
        da = da + da_next + da_before.flip(-1).cumsum(-1).flip(-1)
        da = da.permute(0, 2, 3, 1).flatten(1, 2)[:, : x.shape[1]]  # [B, T, H]
        if initial_state is not None:
            dinitial = dinitial.unflatten(2, states.shape[3:]).to(initial_state.dtype)
        return dx, da, into_B, into_C, dinitial, None, None
