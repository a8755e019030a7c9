// Say what a photo shows, and draw why: node build/explain.js HOST:PORT PHOTO OUT.png [MODEL]
// With HEATLENS_TOKEN, the token is sent; with HEATLENS_CA, a PEM file, the connection is by TLS.

import { readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import * as grpc from "@grpc/grpc-js";
import { loadSync, type MessageTypeDefinition } from "@grpc/proto-loader";
import { PNG } from "pngjs";
import type { ProtoGrpcType } from "./types/explain.js";
import type { ExplainResponse__Output } from "./types/heatlens/v1/ExplainResponse.js";
import type { BadRequest__Output } from "./types/google/rpc/BadRequest.js";
import type { ErrorInfo__Output } from "./types/google/rpc/ErrorInfo.js";
import type { RequestInfo__Output } from "./types/google/rpc/RequestInfo.js";
import type { Status__Output } from "./types/google/rpc/Status.js";

const [address, photo, out, model] = process.argv.slice(2);
if (!address || !photo || !out) {
  console.error("usage: node build/explain.js HOST:PORT PHOTO OUT.png [MODEL]");
  process.exit(2);
}

const root = fileURLToPath(new URL("../../../", import.meta.url));
const definitions = loadSync(
  ["heatlens/v1/explain.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"],
  { includeDirs: [`${root}proto`, `${root}third_party`], keepCase: true, longs: String, enums: String, defaults: true, oneofs: true },
);
const { heatlens } = grpc.loadPackageDefinition(definitions) as unknown as ProtoGrpcType;

const { HEATLENS_CA: ca, HEATLENS_TOKEN: token } = process.env;
const client = new heatlens.v1.ExplainService(
  address,
  ca ? grpc.credentials.createSsl(readFileSync(ca)) : grpc.credentials.createInsecure(),
  { "grpc.max_receive_message_length": 16 << 20 }, // 4 MiB by default
);
const metadata = new grpc.Metadata();
if (token) metadata.set("authorization", `Bearer ${token}`);

client.Explain(
  {
    model,
    image: { encoded: readFileSync(photo) },
    // A byte for each pixel of the photo.
    options: { top_k: 3, map_size: "MAP_SIZE_SOURCE", map_type: "DATA_TYPE_UINT8" },
  },
  metadata,
  { deadline: Date.now() + 30_000 },
  (error, response) => (error ? fail(error) : show(response!, out)),
);

function show(response: ExplainResponse__Output, path: string): void {
  for (const { class_id, label, probability } of response.explanations)
    console.log(`${label || class_id}: ${(100 * probability).toFixed(1)}%`);
  const map = response.explanations[0]!.map!;
  const [height, width] = map.shape.map(Number) as [number, number];
  const picture = new PNG({ width, height });
  map.data.forEach((value, pixel) => {
    // From black through red and yellow to white.
    const color = [3 * value, 3 * value - 255, 3 * value - 510].map((part) => Math.min(255, Math.max(0, part)));
    picture.data.set([...color, 255], 4 * pixel);
  });
  writeFileSync(path, PNG.sync.write(picture));
}

// An error says what is wrong in details for programs: a reason, and of a wrong request the field.
function fail(error: grpc.ServiceError): void {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  const [sent] = error.metadata.get("grpc-status-details-bin");
  const details = sent ? (read<Status__Output>("google.rpc.Status", sent as Buffer).details as unknown as Any[]) : [];
  for (const { type_url, value } of details) {
    const name = type_url.split("/")[1]!;
    if (name === "google.rpc.ErrorInfo") console.error(`reason: ${read<ErrorInfo__Output>(name, value).reason}`);
    if (name === "google.rpc.RequestInfo") console.error(`request: ${read<RequestInfo__Output>(name, value).request_id}`);
    if (name === "google.rpc.BadRequest")
      for (const { field } of read<BadRequest__Output>(name, value).field_violations) console.error(`field: ${field}`);
  }
  process.exitCode = 1;
}

type Any = { type_url: string; value: Buffer };

function read<Message>(name: string, data: Buffer): Message {
  return (definitions[name] as MessageTypeDefinition<object, object>).deserialize(data) as Message;
}
