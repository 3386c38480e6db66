// @grpc/grpc-js with stubs that @grpc/proto-loader makes from proto/ at run time.
//
//   node grpc_js.js MODULES SOURCE EXPECTED TARGET TARGET_OF_ONE
//
// MODULES is the node_modules folder, EXPECTED the demo model's known answers,
// TARGET a server and TARGET_OF_ONE one that runs one request and queues one.
// Ends with 0 and a line of what was seen, or throws.
'use strict';
const assert = require('node:assert/strict');
const fs = require('node:fs');
const path = require('node:path');

const [modules, source, expectedPath, target, targetOfOne] = process.argv.slice(2);
const grpc = require(path.join(modules, '@grpc/grpc-js'));
const loader = require(path.join(modules, '@grpc/proto-loader'));
const expected = JSON.parse(fs.readFileSync(expectedPath)).cases;
const options = {includeDirs: [source], keepCase: true, longs: Number, enums: String, oneofs: true};
const api = grpc.loadPackageDefinition(loader.loadSync('proto/inference.proto', options)).lockstep.v1;
const healthApi =
    grpc.loadPackageDefinition(loader.loadSync('proto/health.proto', options)).grpc.health.v1;
const plain = grpc.credentials.createInsecure();
const inference = (address) => new api.Inference(address, plain);

const call = (client, method, request, callOptions = {}) => new Promise(
    (resolve, reject) => client[method](
        request, new grpc.Metadata(), callOptions,
        (error, answer) => error ? reject(error) : resolve(answer)));

// Every event of a stream; rejects with its error.
const read = (stream, onEvent = () => {}) => new Promise((resolve, reject) => {
  const events = [];
  stream.on('data', (event) => {
    events.push(event);
    onEvent(event, events);
  });
  stream.on('error', reject);
  stream.on('end', () => resolve(events));
});

const byIds = (known, sampling) => ({token_ids: {ids: known.prompt_token_ids}, sampling});
const byChat = (known, sampling) => ({chat: {messages: known.messages}, sampling});
const long = {text: 'Tell me', sampling: {max_tokens: 1500, temperature: 0, ignore_eos: true}};
const textOf = (events) => events.map((event) => event.chunk ? event.chunk.text : '').join('');

async function answers(client) {
  for (const known of expected.slice(0, 12)) {
    const whole = await call(client, 'Generate', byChat(known, {temperature: 0}));
    assert.equal(whole.completions[0].text, known.text);
    assert.deepEqual(whole.completions[0].token_ids, known.greedy_token_ids);
    assert.equal(whole.completions[0].finish.reason, 'FINISH_REASON_STOP');
    const events = await read(client.GenerateStream(byIds(known, {temperature: 0})));
    assert.equal(events[0].event, 'prompt');
    assert.equal(events.at(-1).event, 'finish');
    assert.equal(textOf(events), known.text);
    const told = await call(client, 'Tokenize', {chat: {messages: known.messages}});
    assert.deepEqual(told.token_ids, known.prompt_token_ids);
    const back = await call(client, 'Detokenize', {token_ids: known.prompt_token_ids});
    assert.equal(back.text, known.prompt_text);
  }
  const all = await Promise.all(
      expected.map((known) => read(client.GenerateStream(byChat(known, {temperature: 0})))));
  assert.deepEqual(all.map(textOf), expected.map((known) => known.text));
  const info = await call(client, 'GetModelInfo', {});
  assert.equal(info.tp_size, 2);
  assert.equal(info.ranks.length, 2);
  assert.ok(info.ready);
}

async function health(address) {
  const client = new healthApi.Health(address, plain);
  for (const service of ['', 'lockstep.v1.Inference']) {
    assert.equal((await call(client, 'Check', {service})).status, 'SERVING');
  }
  await assert.rejects(call(client, 'Check', {service: 'nobody'}), {code: grpc.status.NOT_FOUND});
  const watch = client.Watch({service: 'lockstep.v1.Inference'});
  await assert.rejects(read(watch, (event) => {
    assert.equal(event.status, 'SERVING');
    watch.cancel();
  }), {code: grpc.status.CANCELLED});
  client.close();
}

async function refusals(client) {
  for (const [field, sampling] of Object.entries({
         temperature: {temperature: 3}, top_p: {top_p: 0}, logprobs: {logprobs: 21},
         max_tokens: {max_tokens: 5000}, n: {n: 17}})) {
    const wanted = {code: grpc.status.INVALID_ARGUMENT, details: new RegExp(field)};
    await assert.rejects(call(client, 'Generate', {text: 'x', sampling}), wanted);
    await assert.rejects(read(client.GenerateStream({text: 'x', sampling})), wanted);
  }
  const deadline = () => ({deadline: Date.now() + 300});
  const late = {code: grpc.status.DEADLINE_EXCEEDED};
  await assert.rejects(call(client, 'Generate', long, deadline()), late);
  await assert.rejects(read(client.GenerateStream(long, new grpc.Metadata(), deadline())), late);
  const stream = client.GenerateStream(long);
  await assert.rejects(read(stream, (_, events) => {
    if (events.length === 4) stream.cancel();
  }), {code: grpc.status.CANCELLED});
}

// One runs, one of four waits, the others are told when to come back.
async function crowd(address) {
  const client = inference(address);
  const running = client.GenerateStream(long);
  const end = read(running).catch((error) => error);
  await new Promise((resolve) => running.once('data', resolve));
  const more = Array.from({length: 4}, () => client.GenerateStream(long));
  const refused = [];
  const ends = more.map((stream) => read(stream).catch((error) => {
    if (error.code !== grpc.status.RESOURCE_EXHAUSTED) return error;
    refused.push(error);
    if (refused.length === 3) [running, ...more].forEach((other) => other.cancel());
    return error;
  }));
  const codes = (await Promise.all(ends)).map((error) => error.code);
  const {CANCELLED, RESOURCE_EXHAUSTED} = grpc.status;
  assert.deepEqual(
      codes.sort(), [CANCELLED, RESOURCE_EXHAUSTED, RESOURCE_EXHAUSTED, RESOURCE_EXHAUSTED]);
  assert.equal((await end).code, CANCELLED);
  for (const {metadata} of refused) {
    assert.ok(Number(metadata.get('grpc-retry-pushback-ms')[0]) >= 1000);
    // proto-loader gives no decoder of its own for the details: the type's name is in their bytes.
    const [details] = metadata.get('grpc-status-details-bin');
    assert.ok(details.includes('google.rpc.RetryInfo'), details.toString());
  }
  client.close();
}

async function main() {
  const client = inference(target);
  await answers(client);
  await health(target);
  await refusals(client);
  client.close();
  await crowd(targetOfOne);
  const version = require(path.join(modules, '@grpc/grpc-js/package.json')).version;
  console.log(`grpc-js ${version}: calls, streams, health, refusals, deadlines, cancels, pushback`);
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
