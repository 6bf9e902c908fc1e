// Swagger UI over /openapi.json. Where the server asks for a key, the one typed on the page at / is taken, or asked for.
(() => {
  let key = "";
  try {
    key = sessionStorage.getItem("octavo.key") ?? "";
  } catch {
    // storage is shut off
  }

  async function show() {
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    const answer = await fetch("/openapi.json", { headers });
    document.getElementById("key-form").hidden = answer.status !== 401;
    if (!answer.ok) return;
    SwaggerUIBundle({
      spec: await answer.json(),
      dom_id: "#swagger",
      deepLinking: true,
      validatorUrl: null,
      requestInterceptor: (request) => {
        if (key) request.headers.authorization = `Bearer ${key}`;
        return request;
      },
    });
  }

  document.getElementById("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = document.getElementById("key").value;
    show();
  });
  show();
})();
