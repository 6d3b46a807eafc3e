// What the types of openapi-typescript let a program write, and what not. Nothing runs it.

import type { components, operations } from "./openapi";

type Problem = components["schemas"]["Problem"];
type User = components["schemas"]["UserPublic"];

type Requests = { [Name in keyof operations]: Omit<operations[Name], "responses"> };
type Body<Response> = Response extends { content: infer Media } ? Media[keyof Media] : undefined;
type Answer<Responses> = {
  [Status in keyof Responses]: { status: Status; body: Body<Responses[Status]> };
}[keyof Responses];
type Readers = { [Name in keyof operations]: (a: Answer<operations[Name]["responses"]>) => string };

const user = { name: "Ada Lovelace", email: "ada@example.com", password: "correct horse" };

export const requests: Requests = {
  create_user: { parameters: {}, requestBody: { content: { "application/json": user } } },
  list_users: { parameters: { query: { limit: 10, after: 0, email: user.email } } },
  read_user: { parameters: { path: { user_id: 1 } } },
  update_user: {
    parameters: { path: { user_id: 1 } },
    requestBody: { content: { "application/json": user } },
  },
  patch_user: {
    parameters: { path: { user_id: 1 } },
    requestBody: { content: { "application/json": { name: "Ada" } } },
  },
  delete_user: { parameters: { path: { user_id: 1 } } },
  livez: { parameters: {} },
  readyz: { parameters: {} },
};

const show = (user: User): string => `${user.id.toFixed()} ${user.name} ${user.email}`;

function explain(problem: Problem): string {
  const errors = problem.errors ?? []; // may be absent
  const fields = errors.map((error) => `${error.loc.join(".")} ${error.type}: ${error.msg}`);
  return [problem.type, problem.status.toFixed(), problem.title, problem.detail, ...fields].join();
}

// Beside the status of success there are problems only, or these functions are no TypeScript.
export const readers: Readers = {
  create_user: (answer) => (answer.status === 201 ? show(answer.body) : explain(answer.body)),
  list_users: (answer) =>
    answer.status === 200 ? answer.body.map(show).join() : explain(answer.body),
  read_user: (answer) => (answer.status === 200 ? show(answer.body) : explain(answer.body)),
  update_user: (answer) => (answer.status === 200 ? show(answer.body) : explain(answer.body)),
  patch_user: (answer) => (answer.status === 200 ? show(answer.body) : explain(answer.body)),
  delete_user: (answer) => (answer.status === 204 ? "" : explain(answer.body)),
  livez: (answer) => (answer.status === 200 ? "" : explain(answer.body)),
  readyz: (answer) => (answer.status === 200 ? "" : explain(answer.body)),
};

// @ts-expect-error: a user has a password, too
export const incomplete: components["schemas"]["UserCreate"] = { name: "Ada", email: "a@b.io" };
// @ts-expect-error: an id is not for the client to choose
export const chosen: components["schemas"]["UserCreate"] = { ...user, id: 1 };
// @ts-expect-error: null is no name
export const nameless: components["schemas"]["UserUpdate"] = { name: null };
// @ts-expect-error: no answer holds the password
export const leaked = (user: User): string => user.password;
