"Slow, obvious versions that the tests compare with: one section a module"

import itertools

import numpy as np

# memory: bytes of a small tensor program, by bookkeeping alone


def tensor_program_bytes(steps, sizes):
    "(alive, peak) bytes of float32 programs on four names; a name is [storage, elements], a storage [bytes, born inside]"
    names = [[[4 * n, False], n] for n in sizes]
    peak = 0

    def alive(*also): return sum(storage[0] for storage in {id(s): s for s in [name[0] for name in names] + list(also)}.values() if storage[1])

    for step, name, other in steps:
        storage, n = names[name]
        if step in ("new", "data"): made = [[4 * other, True], other]
        elif step == "view": made = [names[other][0], names[other][1]]
        elif step == "clone": made = [[4 * names[other][1], True], names[other][1]]
        elif step == "join": made = [[4 * (n + names[other][1]), True], n + names[other][1]]
        elif step == "drop": made = [[0, True], 0]
        elif step == "grow":
            if 4 * other > storage[0]: peak = max(peak, alive() + 4 * other)  # Old and new block live side by side
            storage[0], made = max(storage[0], 4 * other), [storage, other]
        else: made = names[name]
        peak = max(peak, alive(made[0]))
        names[name] = made
    return alive(), peak


# metrics: sums over all pairs, one pair at a time in spirit, in float64

def kernel_sum(a, b, gamma):
    "Sum of exp(-gamma |a - b|^2) over all pairs"
    return float(np.exp(-gamma * ((a[:, None] - b[None]) ** 2).sum(-1)).sum())


def squared_mmd(x, y, gamma):
    "Biased squared MMD"
    n, m = len(x), len(y)
    return kernel_sum(x, x, gamma) / n**2 + kernel_sum(y, y, gamma) / m**2 - 2 * kernel_sum(x, y, gamma) / (n * m)


def unbiased_mmd(x, y, gammas):
    "Unbiased squared MMD, mean over kernels; the diagonals count 1 a point"
    n, m = len(x), len(y)
    def one(g): return (kernel_sum(x, x, g) - n) / (n * (n - 1)) + (kernel_sum(y, y, g) - m) / (m * (m - 1)) - 2 * kernel_sum(x, y, g) / (n * m)
    return float(np.mean([one(g) for g in gammas]))


def median_squared_distance(y):
    "Median over pairs i < j"
    i, j = np.triu_indices(len(y), 1)
    return float(np.median(((y[i] - y[j]) ** 2).sum(-1)))


def cheapest_assignment(x, y, order=1):
    "Wasserstein distance by the best one-to-one assignment, found by trying them all"
    return min(float(np.mean(np.linalg.norm(x - y[list(p)], axis=1) ** order)) for p in itertools.permutations(range(len(y)))) ** (1 / order)

# noise: report A's circuit, one gate and one sample at a time, on state vectors in float64


def _on(gate, wires, n_qubits):
    "The (2^n, 2^n) matrix of a gate on neighbouring wires; wire 0 is the leftmost factor"
    return np.kron(np.kron(np.eye(2 ** wires[0]), gate), np.eye(2 ** (n_qubits - wires[-1] - 1)))


def circuit_expectations(z, weights):
    "<Z_i>, (batch, n), of latents (batch, 2) and weights (n_layers, 2n - 1)"
    n = (weights.shape[1] + 1) // 2
    cnot = np.eye(4)[[0, 1, 3, 2]]
    rows = []
    for z1, z2 in z:
        state = np.eye(2**n)[0].astype(complex)

        def apply(gate, *wires):
            nonlocal state
            state = _on(gate, wires, n) @ state
        for i in range(n):
            apply(_ry(np.arcsin(z1)), i)
            apply(_rz(np.arcsin(z2)), i)
        for w in weights:
            for i in range(n): apply(_ry(w[i]), i)
            for i in range(n - 1):
                apply(cnot, i, i + 1)
                apply(_rz(w[n + i]), i + 1)
                apply(cnot, i, i + 1)
        rows.append([np.vdot(state, _on(np.diag([1, -1]), (i,), n) @ state).real for i in range(n)])
    return np.array(rows)


def _ry(a): return np.array([[np.cos(a / 2), -np.sin(a / 2)], [np.sin(a / 2), np.cos(a / 2)]])
def _rz(a): return np.diag(np.exp([-0.5j * a, 0.5j * a]))


def slope(function, x, index, step=1e-6):
    "Central difference of a scalar function to one entry of an array"
    moved = np.zeros_like(x)
    moved[index] = step
    return (function(x + moved) - function(x - moved)) / (2 * step)


# circuits: one state, one gate at a time, qubit 0 the leftmost bit

def circuit_expvals(n_qubits, gates):
    "<Z_i> of gates (name, wires, angle) on |0...0>, by dense matrices"
    paulis = {"X": np.array([[0, 1], [1, 0]]), "Y": np.array([[0, -1j], [1j, 0]]), "Z": np.diag([1, -1])}
    def on(matrices):
        full = np.eye(1)
        for wire in range(n_qubits): full = np.kron(full, matrices.get(wire, np.eye(2)))
        return full
    state = np.eye(2**n_qubits)[0].astype(complex)
    for name, wires, angle in gates:
        if name == "CNOT": full = on({wires[0]: np.diag([1, 0])}) + on({wires[0]: np.diag([0, 1]), wires[1]: paulis["X"]})
        else: full = on({wires: np.cos(angle / 2) * np.eye(2) - 1j * np.sin(angle / 2) * paulis[name[1]]})
        state = full @ state
    return np.array([(state.conj() @ on({i: paulis["Z"]}) @ state).real for i in range(n_qubits)])


# hvp: curvature as dense matrices in float64

def dense_curvature(model, loss_fn, x, y, kind="hessian"):
    "Hessian by central differences of the gradient; Gauss-Newton and empirical Fisher by one Jacobian of outputs or losses at a time"
    import copy

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils._pytree import tree_leaves, tree_map
    model = copy.deepcopy(model).double()
    params = list(model.parameters())
    x, y = tree_map(lambda t: t.double() if t.is_floating_point() else t, (x, y))

    def run(x): return model(**x) if isinstance(x, dict) else model(x)
    def flat(tensors): return torch.cat([torch.zeros_like(p).flatten() if t is None else t.flatten() for t, p in zip(tensors, params, strict=True)])
    def gradient(x, y): return flat(torch.autograd.grad(loss_fn(run(x), y), params, allow_unused=True))

    with sdpa_kernel(SDPBackend.MATH):
        if kind == "fisher":
            per_sample = [gradient(*tree_map(lambda t, i=i: t[i:i + 1], (x, y))) for i in range(len(y))]
            return sum(torch.outer(g, g) for g in per_sample) / len(y)
        if kind == "ggn": return _gauss_newton(run(x), loss_fn, y, params, flat, tree_leaves)
        columns = []
        with torch.no_grad(): entries = [(p, i) for p in params for i in range(p.numel())]
        for p, i in entries:
            sides = []
            for step in (1e-5, -1e-5):
                p.data.view(-1)[i] += step
                sides.append(gradient(x, y))
                p.data.view(-1)[i] -= step
            columns.append((sides[0] - sides[1]) / 2e-5)
        return torch.stack(columns, 1)


def _gauss_newton(outputs, loss_fn, y, params, flat, tree_leaves):
    import torch
    z, = (t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor))
    jacobian = torch.stack([flat(torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)) for entry in z.flatten()])
    wrap = (lambda z: {"logits": z}) if isinstance(outputs, dict) else (lambda z: z)
    curvature = torch.autograd.functional.hessian(lambda flat_z: loss_fn(wrap(flat_z.view(z.shape)), y), z.detach().flatten())
    return jacobian.T @ curvature @ jacobian


def double_backward(model, loss_fn, x, y, v):
    "Hessian times v over all samples at once, in float64"
    import copy

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    model = copy.deepcopy(model).double()
    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(model(x), y), params, create_graph=True)])
        return torch.cat([g.flatten() for g in torch.autograd.grad(gradient @ v.double(), params)])
