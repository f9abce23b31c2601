// Checks this client against docs/wire/vectors, without a cloud: node check.mjs
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createPublicKey, createPrivateKey, verify } from "node:crypto";
import { readInvite, renewalMessage, signRenewal } from "./perfit.mjs";
import { StiefelAdamW, fromSafetensors, rateAt, toSafetensors } from "./shift.mjs";

const read = (name) => JSON.parse(readFileSync(new URL(`../../docs/wire/vectors/${name}.json`, import.meta.url)));
const bytes = (hex) => Buffer.from(hex, "hex");
const shiftOf = (listed) =>
  Object.fromEntries(
    Object.entries(listed).map(([name, rows]) => [
      name,
      { shape: Array.isArray(rows[0]) ? [rows.length, rows[0].length] : [rows.length], data: Float32Array.from(rows.flat()) },
    ]),
  );
const isNear = (found, wanted, what) => {
  assert.deepEqual(Object.keys(found).sort(), Object.keys(wanted).sort(), what);
  for (const name of Object.keys(wanted)) {
    assert.deepEqual(found[name].shape, wanted[name].shape, `${what} ${name}`);
    found[name].data.forEach((x, i) => assert(Math.abs(x - wanted[name].data[i]) < 2e-6, `${what} ${name} ${i}`));
  }
};

const { invites, refused } = read("invites");
for (const { invite, ...wanted } of invites) {
  const found = readInvite(invite);
  assert.equal(found.address, wanted.address);
  assert.equal(found.expiresUnix, wanted.expires_unix);
  assert.deepEqual(found.secret, bytes(wanted.secret));
  assert.deepEqual(found.serverCa, bytes(wanted.server_ca));
}
for (const { invite, why } of refused) assert.throws(() => readInvite(invite), undefined, why);

const renewal = read("renewal");
const [key, nonce, csr] = [bytes(renewal.key_pkcs8), bytes(renewal.nonce), bytes(renewal.csr)];
const open = createPublicKey(createPrivateKey({ key, format: "der", type: "pkcs8" }));
assert.deepEqual(renewalMessage(nonce, csr), bytes(renewal.signed_message));
assert(verify("sha256", renewalMessage(nonce, csr), open, bytes(renewal.a_valid_signature)));
assert(verify("sha256", renewalMessage(nonce, csr), open, signRenewal(key, nonce, csr)));

const shifts = read("shifts");
isNear(fromSafetensors(bytes(shifts.bytes.float32)), shiftOf(shifts.tensors), "shift");
isNear(fromSafetensors(toSafetensors(shiftOf(shifts.tensors))), shiftOf(shifts.tensors), "shift and back");
const gradients = read("gradients");
isNear(fromSafetensors(bytes(gradients.bytes.float32)), shiftOf(gradients.received.float32), "gradient");

const { config, start, steps } = read("optimizer");
const optimizer = new StiefelAdamW(config);
let shift = shiftOf(start);
steps.forEach(({ rate, gradient, tensors }, step) => {
  assert(Math.abs(rateAt(step, config) - rate) < 1e-9, `rate of step ${step}`);
  shift = optimizer.step(shift, shiftOf(gradient));
  isNear(shift, shiftOf(tensors), `step ${step}`);
});
console.log("ok");
