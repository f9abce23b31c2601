// A perfit device in Node: identity, certificate, channel and calls. From protos/ and docs/wire alone.
import "reflect-metadata";
import { createHash, sign } from "node:crypto";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import * as x509 from "@peculiar/x509";

const PROTOS = fileURLToPath(new URL("../../protos/", import.meta.url));
const definition = protoLoader.loadSync(["perfit/v1/enrollment.proto", "perfit/v1/personalization.proto"], {
  includeDirs: [PROTOS], keepCase: true, longs: Number, defaults: true,
});
const { Enrollment, Identity, Personalization } = grpc.loadPackageDefinition(definition).perfit.v1;

/** What an invite holds. Throws on one that was altered. */
export function readInvite(text) {
  const compact = text.replace(/\s/g, "");
  if (!compact.startsWith("perfit1-")) throw new Error("not an invite");
  const data = Buffer.from(compact.slice("perfit1-".length), "base64url");
  const body = data.subarray(0, -8);
  const checksum = createHash("sha256").update(body).digest().subarray(0, 8);
  if (body.length < 43 || body[0] !== 1 || !checksum.equals(data.subarray(-8))) {
    throw new Error("the invite was altered or cut");
  }
  let at = 41;
  const take = () => {
    const length = body.readUInt16BE(at);
    at += 2 + length;
    return body.subarray(at - length, at);
  };
  const [address, serverCa] = [take().toString("utf8"), take()];
  return { address, serverCa, expiresUnix: Number(body.readBigUInt64BE(1)), secret: body.subarray(9, 41) };
}

/** A new P-256 key as PKCS#8, DER. */
export async function newKey() {
  const algorithm = { name: "ECDSA", namedCurve: "P-256" };
  const { privateKey } = await crypto.subtle.generateKey(algorithm, true, ["sign", "verify"]);
  return Buffer.from(await crypto.subtle.exportKey("pkcs8", privateKey));
}

/** A PKCS#10 request for the key, DER. */
export async function certificateRequest(key) {
  const algorithm = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" };
  const privateKey = await crypto.subtle.importKey("pkcs8", key, algorithm, true, ["sign"]);
  const { d, ...open } = await crypto.subtle.exportKey("jwk", privateKey);
  const publicKey = await crypto.subtle.importKey("jwk", { ...open, key_ops: ["verify"] }, algorithm, true, ["verify"]);
  const request = await x509.Pkcs10CertificateRequestGenerator.create({
    name: "CN=perfit device", keys: { privateKey, publicKey }, signingAlgorithm: algorithm,
  });
  return Buffer.from(request.rawData);
}

/** Trade an invite for credentials. The same key again gets the same certificate. */
export async function enroll(invite, key) {
  const client = new Enrollment(invite.address, grpc.credentials.createSsl(pem("CERTIFICATE", invite.serverCa)));
  try {
    const answer = await call(client, "Enroll", { secret: invite.secret, csr: await certificateRequest(key) });
    return { ...answer, key, enrolment_address: invite.address };
  } finally {
    client.close();
  }
}

/** New credentials over the channel of the old ones, which hold until the new ones were used. */
export async function renew(credentials, key = credentials.key) {
  const client = open(Identity, credentials);
  try {
    return { ...credentials, ...(await call(client, "Renew", { csr: await certificateRequest(key) })), key };
  } finally {
    client.close();
  }
}

/** New credentials for a certificate that has lapsed, by signing the cloud's nonce with its key. */
export async function renewLapsed(credentials) {
  const roots = pem("CERTIFICATE", credentials.server_ca);
  const client = new Enrollment(credentials.enrolment_address, grpc.credentials.createSsl(roots));
  try {
    const csr = await certificateRequest(credentials.key);
    const { nonce } = await call(client, "Challenge", {});
    const signature = signRenewal(credentials.key, nonce, csr);
    const request = { certificate: credentials.certificate, nonce, signature, csr };
    return { ...credentials, ...(await call(client, "RenewLapsed", request)) };
  } finally {
    client.close();
  }
}

/** The bytes that a renewal signs, and the signature: ECDSA with SHA-256, DER. */
export const renewalMessage = (nonce, csr) => Buffer.concat([Buffer.from("perfit-renew-v1"), nonce, csr]);
export const signRenewal = (key, nonce, csr) => sign("sha256", renewalMessage(nonce, csr), pem("PRIVATE KEY", key));

/** The calls of Personalization over mutual TLS. */
export class Cloud {
  constructor(credentials) {
    this.client = open(Personalization, credentials);
  }

  describe = () => call(this.client, "Describe", {});
  fetchSeed = (artefact) => call(this.client, "FetchSeed", { artefact });
  score = (request) => call(this.client, "Score", request);
  computeGradient = (request) => call(this.client, "ComputeGradient", request);

  /** The whole answer: {text, finish, prompt_tokens, answer_tokens}. */
  async generate(request) {
    const stream = this.client.Generate(request, { deadline: Date.now() + 60_000 });
    let text = "", last = {};
    for await (const part of stream) [text, last] = [text + part.text, part];
    return { ...last, text };
  }

  close = () => this.client.close();
}

/** The word of docs/wire/errors.md that an error carries, or undefined where gRPC made it. */
export const codeOf = (error) => error.metadata?.get("perfit-code")[0];

function open(Service, { address, server_ca, certificate, key }) {
  const [roots, chain] = [pem("CERTIFICATE", server_ca), pem("CERTIFICATE", certificate)];
  return new Service(address, grpc.credentials.createSsl(roots, pem("PRIVATE KEY", key), chain), {
    "grpc.max_receive_message_length": 16 << 20,
  });
}

function call(client, method, request) {
  return new Promise((resolve, reject) => {
    const done = (error, answer) => (error ? reject(error) : resolve(answer));
    client[method](request, { deadline: Date.now() + 60_000 }, done);
  });
}

function pem(kind, der) {
  const lines = Buffer.from(der).toString("base64").match(/.{1,64}/g).join("\n");
  return Buffer.from(`-----BEGIN ${kind}-----\n${lines}\n-----END ${kind}-----\n`);
}
