"Circuits that people write, each as a function of `inputs` (a row of 4 numbers in [0, 1]) and `w` (4 numbers): what a compiled plan must get right"

import functools
import math

import numpy as np
import pennylane as qml
import scipy.stats
import torch

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def unitary(n, seed=0):
    return scipy.stats.unitary_group.rvs(2**n, random_state=seed)


def hermitian(n, seed=0):
    a = np.random.default_rng(seed).normal(size=(2, 2**n, 2**n))
    a = a[0] + 1j * a[1]
    return a + a.conj().T


def amplitudes(n, seed=0):
    a = np.random.default_rng(seed).normal(size=(2, 2**n))
    a = a[0] + 1j * a[1]
    return a / np.linalg.norm(a)


def spread(inputs, w, wires=(0, 1, 2, 3)):
    "A layer that leaves no state special"
    for i, wire in enumerate(wires):
        qml.RY(inputs[..., i % 4] + 0.3 * i, wires=wire)
        qml.RX(w[i % 4], wires=wire)
    for a, b in zip(wires, wires[1:], strict=False):
        qml.CNOT(wires=[a, b])


def close(inputs, w, wires=(0, 1, 2, 3)):
    "Another one, and what is measured"
    for i, wire in enumerate(wires):
        qml.RX(inputs[..., (i + 1) % 4] * 0.7, wires=wire)
        qml.RY(w[i % 4] + 0.1, wires=wire)
    return [qml.expval(qml.PauliZ(wires[0])), qml.expval(qml.PauliX(wires[1]) @ qml.PauliY(wires[2])), qml.probs(wires=[wires[1], wires[0]])]


def gate_case(name, apply):
    "A gate between two layers that leave no state special"

    def circuit(inputs, w):
        spread(inputs, w)
        apply(inputs, w)
        return close(inputs, w)

    CASES[name] = circuit


for _n in (1, 2, 3, 4):
    gate_case(f"unitary_{_n}", lambda x, w, n=_n: qml.QubitUnitary(unitary(n), wires=[2, 0, 3, 1][:n]))
    gate_case(f"diagonal_{_n}", lambda x, w, n=_n: qml.DiagonalQubitUnitary(np.exp(1j * np.arange(2**n) ** 1.5), wires=[2, 0, 3, 1][:n]))
for _n in (1, 2, 3, 4, 5):
    _gate = functools.partial(qml.MultiControlledX, wires=[2, 0, 3, 1, "a", "b"][: _n + 1], control_values=([1, 0] * 3)[:_n])
    gate_case(f"multi_controlled_x_{_n}", lambda x, w, gate=_gate: gate())
_GATES = {
    "unitary_torch": lambda x, w: qml.QubitUnitary(torch.as_tensor(unitary(2)), wires=[2, 0]),
    "controlled_unitary": lambda x, w: qml.ControlledQubitUnitary(unitary(1), wires=[3, 1]),
    "controlled_unitary_2": lambda x, w: qml.ControlledQubitUnitary(unitary(1, 3), wires=[3, 1, 0], control_values=[0, 1]),
    "controlled_unitary_of_two": lambda x, w: qml.ControlledQubitUnitary(unitary(2), wires=[3, 1, 0]),
    "rot": lambda x, w: qml.Rot(x[..., 0], w[1], 0.3, wires=1),
    "u2": lambda x, w: qml.U2(x[..., 0], w[1], wires=1),
    "u3": lambda x, w: qml.U3(w[0], x[..., 0], w[1], wires=1),
    "u1": lambda x, w: qml.U1(w[0], wires=1),
    "crot": lambda x, w: qml.CRot(x[..., 0], w[1], w[2], wires=[1, 0]),
    "toffoli": lambda x, w: qml.Toffoli(wires=[1, 3, 0]),
    "ccz": lambda x, w: qml.CCZ(wires=[1, 3, 0]),
    "cswap": lambda x, w: qml.CSWAP(wires=[1, 3, 0]),
    "sqisw": lambda x, w: qml.SQISW(wires=[1, 3]),
    "siswap": lambda x, w: qml.SISWAP(wires=[1, 3]),
    "iswap": lambda x, w: qml.ISWAP(wires=[1, 3]),
    "ecr": lambda x, w: qml.ECR(wires=[1, 3]),
    "sx": lambda x, w: qml.SX(wires=1),
    "pauli_rot": lambda x, w: qml.PauliRot(x[..., 1], "XYZX", wires=[1, 3, 0, 2]),
    "pauli_rot_shared": lambda x, w: qml.PauliRot(w[1], "YXI", wires=[1, 3, 0]),
    "multi_rz": lambda x, w: qml.MultiRZ(x[..., 1], wires=[1, 3, 0]),
    "ising_xy": lambda x, w: qml.IsingXY(w[0], wires=[1, 3]),
    "pswap": lambda x, w: qml.PSWAP(w[0], wires=[1, 3]),
    "cphase00": lambda x, w: qml.CPhaseShift00(w[0], wires=[1, 3]),
    "cphase01": lambda x, w: qml.CPhaseShift01(x[..., 0], wires=[1, 3]),
    "cphase10": lambda x, w: qml.CPhaseShift10(w[0], wires=[1, 3]),
    "single_excitation": lambda x, w: qml.SingleExcitation(x[..., 0] * w[0], wires=[1, 3]),
    "single_excitation_plus": lambda x, w: qml.SingleExcitationPlus(w[0], wires=[1, 3]),
    "single_excitation_minus": lambda x, w: qml.SingleExcitationMinus(w[0], wires=[1, 3]),
    "double_excitation": lambda x, w: qml.DoubleExcitation(w[0], wires=[1, 3, 0, 2]),
    "double_excitation_plus": lambda x, w: qml.DoubleExcitationPlus(x[..., 0], wires=[1, 3, 0, 2]),
    "orbital_rotation": lambda x, w: qml.OrbitalRotation(w[0], wires=[1, 3, 0, 2]),
    "fermionic_swap": lambda x, w: qml.FermionicSWAP(w[0], wires=[1, 3]),
    "global_phase": lambda x, w: qml.GlobalPhase(w[0]),
    "controlled_global_phase": lambda x, w: qml.ctrl(qml.GlobalPhase, control=2)(w[0]),
    "qft": lambda x, w: qml.QFT(wires=[1, 3, 0]),
    "qft_adjoint": lambda x, w: qml.adjoint(qml.QFT)(wires=[1, 3, 0, 2]),
    "grover": lambda x, w: qml.GroverOperator(wires=[1, 3, 0]),
    "permute": lambda x, w: qml.Permute([2, 0, 1], wires=[0, 1, 2]),
    "hadamard": lambda x, w: qml.Hadamard(wires=0),
    "controlled_hadamard": lambda x, w: qml.CH(wires=[1, 3]),
    "adjoint_gates": lambda x, w: [
        qml.adjoint(qml.S)(wires=0), qml.adjoint(qml.T)(wires=1), qml.adjoint(qml.SX)(wires=1), qml.adjoint(qml.Rot)(w[0], w[1], x[..., 0], wires=2),
        qml.adjoint(qml.CRY)(x[..., 2], wires=[0, 1]), qml.adjoint(qml.ISWAP)(wires=[0, 3]), qml.adjoint(qml.U3)(w[0], w[1], w[2], wires=3),
    ],
    "adjoint_function": lambda x, w: qml.adjoint(spread)(x * 0.5, w),
    "adjoint_unitary": lambda x, w: qml.adjoint(qml.QubitUnitary)(unitary(2), wires=[1, 0]),
    "ctrl_function": lambda x, w: qml.ctrl(spread, control=3)(x * 0.5, w, (0, 1, 2)),
    "ctrl_two_values": lambda x, w: qml.ctrl(qml.Rot, control=[0, 2], control_values=[0, 1])(x[..., 0], w[0], w[1], wires=1),
    "ctrl_swap": lambda x, w: qml.ctrl(qml.SWAP, control=[0])(wires=[1, 2]),
    "ctrl_sx": lambda x, w: qml.ctrl(qml.SX, control=[0, 3])(wires=[1]),
    "ctrl_y": lambda x, w: qml.ctrl(qml.PauliY, control=[0, 3])(wires=[1]),
    "ctrl_t": lambda x, w: qml.ctrl(qml.adjoint(qml.T), control=[0])(wires=[1]),
    "ctrl_ctrl": lambda x, w: qml.ctrl(qml.ctrl(qml.RX, control=0), control=2, control_values=0)(w[0], wires=1),
    "ctrl_adjoint_pauli_rot": lambda x, w: qml.ctrl(qml.adjoint(qml.PauliRot), control=0)(x[..., 0], "XY", wires=[1, 2]),
    "ctrl_unitary": lambda x, w: qml.ctrl(qml.QubitUnitary(unitary(2), wires=[1, 2]), control=[0, 3]),
    "ctrl_double_excitation": lambda x, w: qml.ctrl(qml.SingleExcitation, control=0)(w[0], wires=[1, 2]),
    "ctrl_qft": lambda x, w: qml.ctrl(qml.QFT, control=0)(wires=[1, 2]),
    "pow_gates": lambda x, w: [
        qml.pow(qml.RX(x[..., 0], wires=0), 3), qml.pow(qml.S(wires=1), 0.5), qml.pow(qml.PauliX(2), 0.3), qml.pow(qml.T(wires=1), -2),
        qml.pow(qml.PauliY(0), 2), qml.pow(qml.Hadamard(1), 3), qml.pow(qml.CNOT([0, 1]), 2), qml.pow(qml.SWAP([0, 1]), 0.5),
        qml.pow(qml.IsingXX(w[0], wires=[2, 3]), 0.25), qml.pow(qml.Rot(w[0], w[1], x[..., 0], wires=0), 2),
    ],
    "pow_unitary": lambda x, w: qml.pow(qml.QubitUnitary(unitary(2), wires=[1, 0]), 2),
    "prod": lambda x, w: qml.prod(qml.RX(x[..., 0], wires=0), qml.CNOT([0, 1]), qml.RY(w[2], wires=1)),
    "ctrl_prod": lambda x, w: qml.ctrl(qml.prod(qml.RX(x[..., 0], wires=0), qml.CNOT([0, 1]), qml.RY(w[2], wires=1)), control=3),
    "exp": lambda x, w: qml.exp(qml.PauliX(0) @ qml.PauliY(1), -0.5j * w[0]),
    "exp_inputs": lambda x, w: qml.exp(qml.PauliX(0) @ qml.PauliY(1), 1j * x[..., 0]),
    "exp_constant": lambda x, w: qml.exp(qml.PauliX(0) @ qml.PauliZ(2), 0.7j),
    "evolve": lambda x, w: qml.evolve(qml.PauliX(0) @ qml.PauliZ(2), w[1]),
    "evolve_scaled": lambda x, w: qml.evolve(0.5 * qml.PauliY(3) @ qml.PauliZ(2), x[..., 1]),
    "evolve_sum": lambda x, w: qml.exp(qml.PauliX(0) @ qml.PauliZ(2) + 0.3 * qml.PauliZ(0) @ qml.PauliX(1), 0.4j),
    "trotter": lambda x, w: qml.TrotterProduct(qml.PauliX(0) + 0.5 * qml.PauliZ(1) @ qml.PauliZ(0), 0.7, n=2, order=2),
    "trotter_time": lambda x, w: qml.TrotterProduct(qml.PauliX(0) + 0.5 * qml.PauliZ(1) @ qml.PauliZ(0), w[0], n=2, order=2),
    "commuting_evolution": lambda x, w: qml.CommutingEvolution(qml.PauliX(0) @ qml.PauliX(1) + 0.5 * qml.PauliX(0), w[0]),
    "barrier": lambda x, w: [qml.Barrier(wires=[0, 1]), qml.Identity(wires=0), qml.Snapshot()],
    "select": lambda x, w: qml.Select([qml.RX(w[0], wires=2), qml.RY(x[..., 0], wires=2), qml.PauliX(2), qml.Identity(2)], control=[0, 1]),
    "iqp": lambda x, w: qml.IQPEmbedding(x, wires=range(4), n_repeats=2),
    "random_layers": lambda x, w: qml.RandomLayers(w.reshape(2, 2), wires=range(4), seed=3),
    "two_design": lambda x, w: qml.SimplifiedTwoDesign(w, torch.stack([w[:2], w[1:3], w[2:]]).reshape(1, 3, 2), wires=range(4)),
    "particle": lambda x, w: qml.ParticleConservingU1(w.reshape(1, 2, 2)[:, :1].expand(1, 3, 2), wires=range(4)),
    "gate_fabric": lambda x, w: qml.GateFabric(w[:2].reshape(1, 1, 2), wires=range(4), init_state=[1, 1, 0, 0]),
    "qaoa_embedding": lambda x, w: qml.QAOAEmbedding(x[..., :3], torch.cat([w, w[:2]]).reshape(1, 6), wires=range(3)),
    "basis_state_midway": lambda x, w: qml.BasisEmbedding([1, 0], wires=[0, 1]),
    "amplitude_damping_free": lambda x, w: qml.QubitUnitary(np.eye(2), wires=0),
    "special_unitary": lambda x, w: qml.SpecialUnitary(np.array([0.3, 0.2, -0.4]), wires=0),
    "block_phase": lambda x, w: qml.PhaseShift(w[0] * w[1] + torch.sin(w[2]), wires=1),
    "temporary_and": lambda x, w: [qml.TemporaryAND(["p", "q", "r"]), qml.adjoint(qml.TemporaryAND(["p", "q", "r"]))],
}
for _name, _apply in _GATES.items():
    gate_case(_name, _apply)


def start_case(name, apply):
    def circuit(inputs, w):
        apply(inputs, w)
        for i in range(4):
            qml.RY(w[i], wires=i)
        qml.CNOT(wires=[0, 2])
        qml.RX(inputs[..., 0], wires=2)
        return close(inputs, w)

    CASES[name] = circuit


_STARTS = {
    "state_prep": lambda x, w: qml.StatePrep(amplitudes(4), wires=[2, 0, 1, 3]),
    "state_prep_part": lambda x, w: qml.StatePrep(amplitudes(2), wires=[2, 0]),
    "state_prep_real": lambda x, w: qml.StatePrep(amplitudes(2).real, wires=[2, 0], normalize=True),
    "state_prep_torch": lambda x, w: qml.StatePrep(torch.as_tensor(amplitudes(3)), wires=[2, 0, 1]),
    "state_prep_pad": lambda x, w: qml.StatePrep(np.array([0.6, 0.8j, 0.1]), wires=[2, 0], pad_with=0.0, normalize=True),
    "amplitude_embedding": lambda x, w: qml.AmplitudeEmbedding(np.array([1.0, 2, 3, 4]), wires=[0, 1], normalize=True),
    "basis_state": lambda x, w: qml.BasisState(np.array([1, 0, 1, 1]), wires=range(4)),
    "basis_embedding": lambda x, w: qml.BasisEmbedding(6, wires=range(3)),
    "mottonen": lambda x, w: qml.MottonenStatePreparation(amplitudes(3), wires=range(3)),
    "cosine_window": lambda x, w: qml.CosineWindow(wires=range(3)),
    "angle_x": lambda x, w: qml.AngleEmbedding(x, wires=range(4), rotation="X"),
    "angle_y": lambda x, w: qml.AngleEmbedding(x * math.pi, wires=range(4), rotation="Y"),
    "angle_arcsin": lambda x, w: qml.AngleEmbedding(torch.arcsin(x), wires=range(4), rotation="Y"),
    "strongly": lambda x, w: qml.StronglyEntanglingLayers(w[:3].reshape(1, 1, 3).expand(2, 4, 3), wires=range(4), ranges=[1, 2]),
}
for _name, _apply in _STARTS.items():
    start_case(_name, _apply)


def angles_case(name, angles):
    "Arithmetic: four angles from inputs and weights"

    def circuit(inputs, w):
        found = angles(inputs, w)
        for i in range(4):
            qml.RY(found[..., i] if isinstance(found, torch.Tensor) else found[i], wires=i)
        qml.CNOT(wires=[0, 1])
        qml.CNOT(wires=[2, 3])
        return close(inputs, w)

    CASES[name] = circuit


_ANGLES = {
    "sin": lambda x, w: torch.sin(x * 3) + torch.cos(w),
    "arccos": lambda x, w: torch.arccos(x * 0.9),
    "arcsin_scaled": lambda x, w: 2 * torch.asin(x * 0.5) + 0.3,
    "arcsin_of_weight": lambda x, w: torch.asin(torch.tanh(w)) + x,
    "atan2": lambda x, w: torch.atan2(x + 0.1, w),
    "index": lambda x, w: x[..., [3, 1, 0, 2]] + w[torch.tensor([0, 0, 1, 1])],
    "flip": lambda x, w: torch.flip(x, (-1,)) * 0.5,
    "roll": lambda x, w: torch.roll(x, 1, -1),
    "reshape": lambda x, w: (x.reshape(2, 2) @ w.reshape(2, 2)).reshape(4),
    "transpose": lambda x, w: x.reshape(2, 2).T.reshape(4),
    "sum": lambda x, w: x.sum() * w,
    "mean": lambda x, w: (x - x.mean()) / (x.std() + 1),
    "outer": lambda x, w: torch.outer(x[:2], w[:2]).flatten(),
    "matmul": lambda x, w: w.reshape(2, 2).repeat(2, 2) @ x,
    "einsum": lambda x, w: torch.einsum("i,ij->j", x, w[:, None] * torch.ones(4, dtype=w.dtype)),
    "stack": lambda x, w: torch.stack([x[0], w[0], x[1] * w[1], w[3] ** 2]),
    "cat": lambda x, w: torch.cat([x[:2], w[2:]]),
    "where": lambda x, w: torch.where(x > 0.5, w, x),
    "clamp": lambda x, w: torch.clamp(w, -1, 1) + x.abs(),
    "pow": lambda x, w: x**2 + w**3,
    "softmax": lambda x, w: torch.softmax(w, 0) * 3 + x,
    "number_minus": lambda x, w: math.pi - x,
    "rsub_weight": lambda x, w: 1 - w,
    "divide": lambda x, w: x / 3 + 2 / (w.abs() + 1),
    "negative": lambda x, w: -x,
    "numpy_constant": lambda x, w: x * np.pi + torch.from_numpy(np.arange(4.0)),
    "numpy_product": lambda x, w: [np.float64(0.3) * x[i] for i in range(4)],
    "qml_math": lambda x, w: qml.math.sin(x) + qml.math.arctan(w),
    "unbind": lambda x, w: [a + b for a, b in zip(x, w, strict=True)],
    "iterate": lambda x, w: [a * 2 for a in w],
    "split": lambda x, w: torch.cat(torch.split(x, 2)[::-1]),
    "chunked": lambda x, w: [p for part in torch.chunk(w, 2) for p in part],
    "diff_dtype": lambda x, w: x.to(torch.float64) * 2,
    "int_constant": lambda x, w: x * torch.arange(4),
    "linear": lambda x, w: torch.nn.functional.linear(x, torch.ones(4, 4, dtype=x.dtype) * 0.3),
    "zeros_written": lambda x, w: torch.zeros(4, dtype=x.dtype) + x,
    "sort": lambda x, w: torch.sort(x).values,
    "cumsum": lambda x, w: torch.cumsum(w, 0) - torch.cumsum(x, -1),
    "max": lambda x, w: x * torch.max(w),
    "norm": lambda x, w: x / torch.linalg.norm(w),
    "dot": lambda x, w: torch.dot(x, w) * x,
    "sigmoid": lambda x, w: torch.sigmoid(w) * 3,
    "double_use": lambda x, w: x * w + x * x - w * w,
    "triple_arcsine": lambda x, w: torch.asin(torch.asin(x * 0.6)),
    "arcsin_minus": lambda x, w: -torch.asin(x) * 0.5,
    "arcsin_negative": lambda x, w: torch.asin(-x),
    "deg": lambda x, w: torch.deg2rad(x * 90),
    "erf": lambda x, w: torch.erf(x),
    "constant_row": lambda x, w: torch.ones(4, dtype=torch.float64) * 0.3,
    "only_detached": lambda x, w: [x.detach()[0], w.detach()[1] * 2, x[1], w[0]],
    "detached": lambda x, w: x.detach() + w,
}
for _name, _angles in _ANGLES.items():
    angles_case(_name, _angles)


def measure_case(name, measure):
    def circuit(inputs, w):
        spread(inputs, w)
        for i in range(4):
            qml.RX(w[i] - 0.4, wires=i)
        return measure()

    CASES[name] = circuit


def _z(i):
    return qml.PauliZ(i)


_MEASURES = {
    "hamiltonian": lambda: [qml.expval(qml.Hamiltonian([0.5, -1.2, 0.3], [_z(0) @ qml.PauliX(2), qml.PauliY(1), qml.Identity(0)]))],
    "linear_combination": lambda: qml.expval(qml.ops.LinearCombination([0.5, 2.0], [_z(0), qml.PauliX(1) @ qml.PauliX(2)])),
    "sum_operators": lambda: qml.expval(_z(0) + 2 * qml.PauliX(1) - 0.5 * (_z(2) @ _z(3))),
    "squared": lambda: qml.expval((_z(0) + qml.PauliX(1)) @ (_z(0) + qml.PauliX(1))),
    "projector_basis": lambda: qml.expval(qml.Projector([1, 0, 1], wires=[2, 0, 1])),
    "projector_state": lambda: qml.expval(qml.Projector(amplitudes(2), wires=[2, 0])),
    "hermitian_1": lambda: qml.expval(qml.Hermitian(hermitian(1), wires=2)),
    "hermitian_2": lambda: qml.expval(qml.Hermitian(hermitian(2), wires=[2, 0])),
    "hermitian_3": lambda: [qml.expval(qml.Hermitian(hermitian(3), wires=[2, 0, 3])), qml.expval(_z(0))],
    "hermitian_product": lambda: qml.expval(qml.Hermitian(hermitian(1), wires=2) @ _z(0)),
    "hermitian_sum": lambda: qml.expval(qml.Hermitian(hermitian(1), wires=2) + 0.5 * _z(0)),
    "hadamard_observable": lambda: qml.expval(qml.Hadamard(0)),
    "hadamard_product": lambda: qml.expval(qml.Hadamard(0) @ qml.PauliX(1)),
    "sparse": lambda: qml.expval(qml.SparseHamiltonian(qml.Hamiltonian([0.5, 1], [_z(0), qml.PauliX(1)]).sparse_matrix([0, 1, 2]), wires=[0, 1, 2])),
    "identity": lambda: [qml.expval(qml.Identity(0)), qml.expval(qml.PauliY(3))],
    "identity_only": lambda: qml.expval(qml.Identity(0)),
    "probs_wires": lambda: qml.probs(wires=[3, 0, 1]),
    "probs_all": lambda: qml.probs(),
    "probs_every": lambda: qml.probs(wires=range(4)),
    "probs_observable": lambda: qml.probs(op=qml.PauliX(1)),
    "probs_product": lambda: qml.probs(op=qml.PauliX(1) @ qml.PauliY(3)),
    "probs_hermitian": lambda: qml.probs(op=qml.Hermitian(hermitian(2), wires=[2, 0])),
    "mixed_returns": lambda: [qml.probs(wires=0), qml.expval(_z(1)), qml.probs(wires=[2, 3]), qml.expval(qml.PauliX(0) @ qml.PauliX(1))],
    "tuple": lambda: (qml.expval(_z(1)), qml.probs(wires=[2, 3])),
    "same_twice": lambda: [qml.expval(_z(1)), qml.expval(_z(1)), qml.expval(-2 * _z(1)), qml.probs(wires=1)],
    "untouched": lambda: [qml.expval(_z("other")), qml.probs(wires=["other", 0]), qml.expval(_z(0))],
    "evolved_observable": lambda: qml.expval(qml.adjoint(qml.PauliY(0)) @ qml.PauliZ(1)),
    "pow_observable": lambda: qml.expval(qml.pow(qml.PauliY(0) + qml.PauliZ(1), 2)),
    "scaled": lambda: qml.expval(qml.s_prod(0.3, qml.PauliY(0))),
    "s_prod_hermitian": lambda: qml.expval(qml.s_prod(0.3, qml.Hermitian(hermitian(2), wires=[0, 3]))),
}
for _name, _measure in _MEASURES.items():
    measure_case(_name, _measure)


@case
def string_wires(inputs, w):
    spread(inputs, w, ("a", 3, "ancilla", -1))
    return close(inputs, w, ("a", 3, "ancilla", -1))


@case
def only_inputs(inputs, w):
    qml.AngleEmbedding(inputs, wires=range(4))
    return [qml.expval(qml.PauliZ(i)) for i in range(4)]


@case
def only_weights(inputs, w):
    for i in range(4):
        qml.RX(w[i], wires=i)
    return [qml.expval(qml.PauliZ(i)) for i in range(4)]


@case
def constant(inputs, w):
    qml.RX(0.3, wires=0)
    return [qml.expval(qml.PauliZ(0)), qml.expval(qml.PauliZ(1))]


@case
def no_gates(inputs, w):
    return [qml.expval(qml.PauliZ(0)), qml.probs(wires=[0, 1]), qml.expval(qml.PauliX(0))]


@case
def uploads(inputs, w):
    for layer in range(3):
        for i in range(4):
            qml.RX(inputs[..., i] * w[i] + layer, wires=i)
            qml.RZ(w[(i + layer) % 4] ** 2, wires=i)
        for i in range(3):
            qml.CZ(wires=[i, i + 1])
    return [qml.expval(qml.PauliZ(i)) for i in range(4)]


@case
def one_qubit(inputs, w):
    for i in range(4):
        qml.Rot(inputs[..., i], w[i], inputs[..., i] * w[i], wires=0)
    return qml.expval(qml.PauliY(0))


@case
def nested_functions(inputs, w):
    def layer(angles, wires):
        for a, wire in zip(angles, wires, strict=True):
            qml.RX(a, wires=wire)

    layer(w, range(4))
    qml.layer(lambda a: layer(a, range(4)), 2, torch.stack([w, w * 2]))
    layer(list(inputs), range(4))
    return [qml.expval(qml.PauliZ(i)) for i in range(4)]


@case
def a_state_and_back(inputs, w):
    with qml.QueuingManager.stop_recording():
        op = qml.RX(w[0], wires=0)
    qml.apply(op)
    spread(inputs, w)
    return close(inputs, w)


def turned(angles):
    for q, angle in enumerate(angles): qml.RY(angle, wires=q)
    qml.CNOT([0, 1])
    qml.RX(angles[0], wires=1)
    return [qml.expval(qml.PauliZ(0)), qml.expval(qml.PauliZ(1) @ qml.PauliX(0))]


@case
def writes_an_item(inputs, w):
    x = inputs.clone()
    x[0] = x[0] * 2
    return turned([x[0], x[1], w[0]])


@case
def writes_slices(inputs, w):
    x = inputs.clone()
    x[1:].add_(w[:3])
    x[:1] *= 2
    x[::2] = x[1::2] + w[1]
    x.view(-1).mul_(2)
    return turned(list(x))


@case
def writes_into_zeros(inputs, w):
    angles = torch.zeros(2, 2, dtype=inputs.dtype)
    for i in range(2): angles[i, 0] = inputs[i] * w[i]
    angles[:, 1] = w[2:]
    return turned(list(angles.flatten()))


@case
def writes_a_diagonal(inputs, w):
    square = (inputs[0] * w).reshape(2, 2)
    square.diagonal().mul_(2)
    return turned([square[0, 0], square[0, 1], square[1, 1]])


@case
def rounds(inputs, w):
    return turned([(3 * inputs[0]).int() * w[0], w[1], inputs[2].long().to(inputs.dtype) + w[2]])


@case
def roots_and_logarithms(inputs, w):
    return turned([torch.sqrt(inputs[0]), torch.log(inputs[1] + 0.01), torch.log1p(5 * inputs[2]) * w[0], torch.asin(2 * inputs[3] - 1)])


@case
def one_arcsine(inputs, w):
    return turned([torch.arcsin(inputs[0]), 3 * inputs[1], w[0]])
