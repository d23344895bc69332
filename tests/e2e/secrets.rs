//! Passwords and tokens are nowhere but in memory: a pull with secrets, with everything logged, and then a search of all that the daemon
//! has written or says.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use base64::Engine as _;

use crate::support::containerd::{Containerd, Generation};
use crate::support::fault_registry::{Auth, FaultRegistry};
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries};
use crate::support::lazuli::{self, Lazuli, SNAPSHOTTER};
use crate::support::sandbox::{PATIENCE, Sandbox, run, run_ok};

const USER: &str = "somebody";
const PASSWORD: &str = "pa55/w0rd+that&nobody=knows";

/// The forms in which the secret might be found: as it is, in addresses, and with the user as Basic sends it.
fn forms() -> Vec<String> {
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let escaped: String = PASSWORD
        .bytes()
        .map(|byte| match byte.is_ascii_alphanumeric() {
            true => char::from(byte).to_string(),
            false => format!("%{byte:02X}"),
        })
        .collect();
    vec![
        PASSWORD.to_owned(),
        escaped.to_lowercase(),
        escaped,
        encode(&format!("{USER}:{PASSWORD}")),
        encode(PASSWORD).trim_end_matches('=').to_owned(),
        // As the registry calls the tokens that it gives out.
        "token-1".to_owned(),
        "token-2".to_owned(),
    ]
}

/// Where one of the forms is.
fn found(what: &str, bytes: &[u8], forms: &[String]) -> Vec<String> {
    let holds = |form: &&String| bytes.windows(form.len()).any(|window| window == form.as_bytes());
    forms
        .iter()
        .filter(holds)
        .map(|form| format!("{what} holds {form}"))
        .collect()
}

/// The files below `dir`, on its own file system: what is mounted there are layers.
fn search(dir: &Path, device: u64, forms: &[String], all: &mut (usize, Vec<String>)) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let Ok(metadata) = std::fs::symlink_metadata(&path) else {
            continue;
        };
        if metadata.dev() != device {
            continue;
        }
        if metadata.is_dir() {
            search(&path, device, forms, all);
        } else if metadata.is_file() {
            all.0 += 1;
            let bytes = std::fs::read(&path).unwrap();
            all.1.extend(found(&path.display().to_string(), &bytes, forms));
        }
    }
}

#[test]
fn secrets_are_nowhere_but_in_memory() {
    let sandbox = Sandbox::new("secrets");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let registry = runtime.block_on(FaultRegistry::start());
    let image = Image::new(Flavour::Oci, vec![Layer::of(Compression::Gzip, base_entries())]);
    for blob in image.blobs() {
        registry.add_blob(blob.bytes.as_slice().to_vec());
    }
    let manifest = registry.add_manifest(image.media_type, image.manifest.bytes.as_slice().to_vec());
    registry.tag("demo/app", "1", manifest);
    let host = registry.host();
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let login = serde_json::json!({"auths": {&host: {"auth": auth}}});
    std::fs::write(sandbox.path("config.json"), login.to_string()).unwrap();
    let hosts = sandbox.dir("certs.d").join(&host);
    std::fs::create_dir_all(&hosts).unwrap();
    std::fs::write(hosts.join("hosts.toml"), format!("server = \"http://{host}\"\n")).unwrap();
    let config = format!("docker_config = {:?}\n", sandbox.path("config.json"));
    let mut lazuli = Lazuli::start(
        &sandbox,
        &sandbox.path("containerd/c.sock"),
        std::slice::from_ref(&host),
        &config,
    );
    assert!(lazuli.stop());
    let config = std::fs::read_to_string(lazuli.config()).unwrap();
    let config = config
        .replace("admin_address = \"\"", "admin_address = \"127.0.0.1:0\"")
        .replace("info,lazuli=debug", "trace");
    std::fs::write(lazuli.config(), config).unwrap();
    lazuli.restart();
    // Later, or it would notice the restart, and pause before it connects again.
    let containerd = Containerd::start(&sandbox, Generation::One, &lazuli::address_in(&sandbox));

    let reference = format!("{host}/demo/app:1");
    for auth in [
        Auth::Token(USER.to_owned(), PASSWORD.to_owned()),
        Auth::Basic(USER.to_owned(), PASSWORD.to_owned()),
    ] {
        registry.set_auth(auth);
        lazuli.pull(&reference).expect_success();
        assert!(
            containerd
                .sh(&reference, SNAPSHOTTER, "cat /etc/passwd")
                .contains("root")
        );
        containerd.remove_image(&reference);
    }
    // What is refused says a lot.
    registry.set_auth(Auth::Token(USER.to_owned(), "another".to_owned()));
    let refused = run(&mut lazuli.command("pull", &[&format!("{host}/demo/app:2")]), PATIENCE);
    assert!(!refused.success());

    let forms = forms();
    let log = lazuli.log();
    assert!(log.contains("TRACE"), "nothing is traced");
    let mut all = (0, found("the log", log.as_bytes(), &forms));
    all.1
        .extend(found("the refusal", refused.describe().as_bytes(), &forms));
    for arguments in [&["--json"][..], &[]] {
        let status = run_ok(&mut lazuli.command("status", arguments)).text();
        all.1.extend(found("status", status.as_bytes(), &forms));
    }
    let (_, address) = log.rsplit_once("metrics and health address=").unwrap();
    let address = address.split_whitespace().next().unwrap();
    for path in ["/metrics", "/healthz", "/readyz"] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{path}");
        all.1.extend(found(path, &answer, &forms));
    }
    let root = lazuli.root();
    let device = std::fs::metadata(&root).unwrap().dev();
    search(&root, device, &forms, &mut all);
    assert!(all.0 > 3, "only {} files were searched", all.0);
    assert!(all.1.is_empty(), "{}", all.1.join("\n"));
    // The search itself: the secret is found where it has to be.
    let login = std::fs::read(sandbox.path("config.json")).unwrap();
    assert!(!found("config.json", &login, &forms).is_empty());
}
