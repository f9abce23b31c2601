// Enrol, ask, take one step of an update, renew, ask again:
//   perfit-cloud invite | node client.mjs "Ferries stood still on Monday."
// Prints one JSON object. A real device keeps key, credentials and tensors sealed on its disk.
import { readFileSync } from "node:fs";
import { Cloud, codeOf, enroll, newKey, readInvite, renew } from "./perfit.mjs";
import { StiefelAdamW, fromSafetensors, toSafetensors } from "./shift.mjs";

const text = process.argv[2] ?? "Ferries stood still on Monday.";
const credentials = await enroll(readInvite(readFileSync(0, "utf8")), await newKey());
const cloud = new Cloud(credentials);

const { artefacts: [artefact], limits } = await cloud.describe();
const task = JSON.parse(artefact.task_json);
const [[, field]] = [...task.template.matchAll(/(?<!\{)\{(\w+)\}(?!\})/g)];
const prompt = { text: task.template.replace(`{${field}}`, text) };
const use = (mode, personal) => ({
  mode: `SHIFT_MODE_${mode}`, ...(mode === "BASE" ? {} : { artefact: artefact.name, version: artefact.version }),
  ...(personal && { personal: toSafetensors(personal) }),
});
const sampling = { max_new_tokens: Math.min(task.answer_tokens ?? 48, 12, limits.new_tokens), stop: task.stop ?? ["\n"] };
const ask = async (shift) => (await cloud.generate({ prompt, shift, sampling })).text;

const seed = fromSafetensors((await cloud.fetchSeed(artefact.name)).seed);
const answers = { base: await ask(use("BASE")), collective: await ask(use("COLLECTIVE")) };
answers.seed = await ask(use("PERSONAL", seed));

// One step on one example; a real update takes hundreds, and keeps them only if held-out examples agree.
const examples = [{ prompt, target: " no ferries" }];
const optimizer = new StiefelAdamW({
  learning_rate: 10 * artefact.learning_rate, total_steps: 10, clip: 0.3, // so that one step shows
  beta1: 0.9, beta2: 0.999, epsilon: 1e-8,
});
const before = await cloud.computeGradient({ examples, shift: use("PERSONAL", seed) });
const moved = optimizer.step(seed, fromSafetensors(before.gradient));
const after = await cloud.computeGradient({ examples, shift: use("PERSONAL", moved) });
answers.personal = await ask(use("PERSONAL", moved));

const refused = await cloud.generate({ prompt: { text: "" }, shift: use("BASE"), sampling }).catch(codeOf);
cloud.close();
const renewed = new Cloud(await renew(credentials, await newKey()));
const { cloud_id } = await renewed.describe();
renewed.close();
console.log(JSON.stringify({ answers, before: before.loss, after: after.loss, refused, renewed: cloud_id !== "" }));
