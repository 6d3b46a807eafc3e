// Fastify with pg and prepared statements, as their documentation shows: a yardstick from outside of Python.

import { parseArgs } from "node:util";
import Fastify from "fastify";
import pg from "pg";

const { port } = parseArgs({ options: { port: { type: "string" } } }).values;
const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: Number(process.env.POOL) });
const app = Fastify();

const id = { type: "integer" };
const text = { type: "string" };
const user = { type: "object", properties: { id, name: text, email: text } };
const one = { params: { type: "object", properties: { id } }, response: { "2xx": user } };
const create = { type: "object", required: ["name", "email", "password"], properties: { name: text, email: text, password: text } };
const update = { type: "object", required: ["name"], properties: { name: text } };
const page = { type: "object", properties: { limit: { type: "integer", default: 50 }, after: { type: "integer", default: 0 } } };

async function find(reply, query) {
  const { rows } = await pool.query(query);
  return rows[0] ?? reply.code(404).send();
}

app.post("/users", { schema: { ...one, body: create } }, ({ body }, reply) => {
  reply.code(201);
  return find(reply, {
    name: "insert",
    text: "INSERT INTO users (name, email, password_hash) VALUES ($1, $2, $3) RETURNING id, name, email",
    values: [body.name, body.email, "a constant"],
  });
});

app.get("/users", { schema: { querystring: page, response: { "2xx": { type: "array", items: user } } } }, async ({ query }) => {
  const { rows } = await pool.query({
    name: "list",
    text: "SELECT id, name, email FROM users WHERE id > $1 ORDER BY id LIMIT $2",
    values: [query.after, query.limit],
  });
  return rows;
});

app.get("/users/:id", { schema: one }, ({ params }, reply) =>
  find(reply, {
    name: "select",
    text: "SELECT id, name, email FROM users WHERE id = $1",
    values: [params.id],
  }));

app.patch("/users/:id", { schema: { ...one, body: update } }, ({ params, body }, reply) =>
  find(reply, {
    name: "update",
    text: "UPDATE users SET name = $2 WHERE id = $1 RETURNING id, name, email",
    values: [params.id, body.name],
  }));

await app.listen({ port: Number(port) });
