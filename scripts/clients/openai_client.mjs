// The official client for Node: chat and responses, whole and streamed.
import OpenAI from "openai";

const [model, question] = process.argv.slice(2);
const client = new OpenAI({ maxRetries: 0 }); // reads OPENAI_BASE_URL and OPENAI_API_KEY
const messages = [{ role: "user", content: question }];

const whole = await client.chat.completions.create({ model, messages, max_completion_tokens: 40 });
console.log("chat:", whole.choices[0].message.content, whole.choices[0].finish_reason);
let text = "";
const stream = await client.chat.completions.create({ model, messages, max_tokens: 40, stream: true });
for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
console.log("chat, streamed:", text);
const response = await client.responses.create({ model, input: question, max_output_tokens: 40 });
console.log("responses:", response.output_text, response.status, response.usage.total_tokens);
const events = client.responses.stream({ model, input: question, max_output_tokens: 40 });
let streamed = "";
let last; // completed, or incomplete at max_output_tokens
for await (last of events) if (last.type === "response.output_text.delta") streamed += last.delta;
console.log("responses, streamed:", streamed, last.response.status);
