// Personal tensors: safetensors in the float32 form, and the step that an update takes (docs/wire/client.md).
// A tensor is {shape, data: Float32Array}; a shift maps "layers.{l}.{rotation|source|bias}" to tensors.

/** The tensors of safetensors bytes; all of them float32. */
export function fromSafetensors(bytes) {
  const headerSize = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.subarray(8, 8 + headerSize).toString());
  const shift = {};
  for (const [name, { dtype, shape, data_offsets: [start, end] }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (dtype !== "F32") throw new Error(`${name} is ${dtype}; this example reads float32 alone`);
    const body = Uint8Array.from(bytes.subarray(8 + headerSize + start, 8 + headerSize + end));
    shift[name] = { shape, data: new Float32Array(body.buffer) };
  }
  return shift;
}

export function toSafetensors(shift) {
  const header = {}, bodies = [];
  let at = 0;
  for (const [name, { shape, data }] of Object.entries(shift)) {
    header[name] = { dtype: "F32", shape, data_offsets: [at, (at += data.byteLength)] };
    bodies.push(Buffer.from(data.buffer, data.byteOffset, data.byteLength));
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (text.length % 8)) % 8); // tensors begin at a multiple of 8
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([size, Buffer.from(text), ...bodies]);
}

/** The rate of one step: it grows tenfold up to the peak half-way, then decays linearly. */
export function rateAt(step, { learning_rate, total_steps }) {
  const top = Math.max(1, Math.floor(total_steps / 2));
  if (step <= top) return learning_rate * 10 ** ((step - top) / top);
  return (learning_rate * (total_steps - step)) / (total_steps - top);
}

/** Adam on sources and biases; on rotations along the Stiefel manifold, where rows stay orthonormal. */
export class StiefelAdamW {
  constructor(config) {
    this.config = config;
    this.steps = 0;
    this.first = {};
    this.second = {};
  }

  /** The shift after one step. */
  step(shift, gradient) {
    const { clip } = this.config;
    const norm = Math.sqrt(sum(Object.values(gradient), ({ data }) => sum(data, (x) => x * x)));
    const scale = Math.min(1, clip / (norm + 1e-6));
    const rate = rateAt(this.steps++, this.config);
    const moved = {};
    for (const [name, { shape, data }] of Object.entries(shift)) {
      const along = Float64Array.from(gradient[name].data, (x) => x * scale);
      const next = name.endsWith(".rotation")
        ? this.rotate(name, data, along, shape, rate)
        : this.direction(name, along, along.map((x) => x * x), 1).map((x, i) => data[i] - rate * x);
      moved[name] = { shape, data: Float32Array.from(next) };
    }
    return moved;
  }

  rotate(name, rotation, gradient, [r, d], rate) {
    if (this.first[name]) this.first[name] = tangent(rotation, this.first[name], r, d);
    const along = tangent(rotation, gradient, r, d);
    const rows = [...Array(r).keys()].map((i) => sum(along.subarray(i * d, (i + 1) * d), (x) => x * x) / d);
    const direction = this.direction(name, along, Float64Array.from(rows), d).map((x) => -4 * rate * x);
    const change = tangent(rotation, direction, r, d);
    return orthonormal(change.map((x, i) => rotation[i] + x), r, d);
  }

  /** m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon); `squares` has one number for `width` ones. */
  direction(name, gradient, squares, width) {
    const { beta1, beta2, epsilon } = this.config;
    const m = (this.first[name] = mixed(this.first[name], gradient, beta1));
    const v = (this.second[name] = mixed(this.second[name], squares, beta2));
    const [c1, c2] = [1 - beta1 ** this.steps, 1 - beta2 ** this.steps];
    return m.map((x, i) => x / ((Math.sqrt(v[Math.floor(i / width)] / c2) + epsilon) * c1));
  }
}

const sum = (values, of) => values.reduce((total, x) => total + of(x), 0);
const mixed = (old, now, beta) => now.map((x, i) => beta * (old?.[i] ?? 0) + (1 - beta) * x);

/** A - (A R' + R A') R / 2 for R and A of r rows and d columns. */
function tangent(rotation, ambient, r, d) {
  const row = (matrix, i) => matrix.subarray(i * d, (i + 1) * d);
  const dot = (a, b) => a.reduce((total, x, k) => total + x * b[k], 0);
  const result = Float64Array.from(ambient);
  for (let i = 0; i < r; i++) {
    for (let j = 0; j < r; j++) {
      const part = (dot(row(ambient, i), row(rotation, j)) + dot(row(rotation, i), row(ambient, j))) / 2;
      for (let k = 0; k < d; k++) result[i * d + k] -= part * rotation[j * d + k];
    }
  }
  return result;
}

/** Rows made orthonormal, one after the other (Gram-Schmidt: QR with a positive diagonal). */
function orthonormal(matrix, r, d) {
  for (let i = 0; i < r; i++) {
    const row = matrix.subarray(i * d, (i + 1) * d);
    for (let j = 0; j < i; j++) {
      const before = matrix.subarray(j * d, (j + 1) * d);
      const along = sum(row.map((x, k) => x * before[k]), (x) => x);
      row.forEach((x, k) => (row[k] = x - along * before[k]));
    }
    const length = Math.sqrt(sum(row, (x) => x * x));
    row.forEach((x, k) => (row[k] = x / length));
  }
  return matrix;
}
