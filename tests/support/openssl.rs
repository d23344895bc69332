//! Certificates made by the `openssl` command, and servers that show them: what people really have.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Arguments that make a key, by its kind.
pub fn key(kind: &str) -> Vec<String> {
    let words = match kind {
        "rsa" => "-newkey rsa:2048",
        "ed25519" => "-newkey ed25519",
        curve => return key_of_curve(curve),
    };
    words.split(' ').map(str::to_owned).collect()
}

fn key_of_curve(curve: &str) -> Vec<String> {
    ["-newkey", "ec", "-pkeyopt", &format!("ec_paramgen_curve:{curve}")]
        .map(str::to_owned)
        .into()
}

/// A directory of certificates and keys.
pub struct Pki {
    dir: tempfile::TempDir,
}

impl Default for Pki {
    fn default() -> Self {
        Pki {
            dir: tempfile::tempdir().unwrap(),
        }
    }
}

impl Pki {
    /// The path of a file.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The content of a file.
    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// Writes a file.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), content).unwrap();
    }

    /// Runs the command in the directory.
    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) {
        let mut command = Command::new("openssl");
        let output = command.args(args).current_dir(self.dir.path()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}: {said}");
    }

    /// Runs the command with arguments that hold no spaces.
    pub fn words(&self, line: &str) {
        self.run(line.split_whitespace());
    }

    /// `NAME.crt` and `NAME.key` as `openssl req -x509` makes them, with more arguments.
    pub fn self_signed(&self, name: &str, kind: &str, more: &[&str]) {
        let (certificate, private) = (format!("{name}.crt"), format!("{name}.key"));
        let subject = format!("/CN={name}");
        let first = [
            "req",
            "-x509",
            "-nodes",
            "-keyout",
            &private,
            "-out",
            &certificate,
            "-subj",
            &subject,
        ];
        let args = first.iter().map(|arg| (*arg).to_owned()).chain(key(kind));
        self.run(args.chain(more.iter().map(|arg| (*arg).to_owned())));
    }

    /// Signs `NAME.csr` again, for the time between two dates such as `20200101000000Z`.
    pub fn date(&self, name: &str, by: &str, from: &str, to: &str) {
        self.write("ca.cnf", CA);
        self.write("index.txt", "");
        self.words(&format!(
            "ca -batch -config ca.cnf -in {name}.csr -cert {by}.crt -keyfile {by}.key -startdate {from} -enddate {to} \
             -extfile {name}.ext -out {name}.crt -notext"
        ));
    }

    /// `NAME.crt` and `NAME.key`, signed by `BY.crt`, with these extensions.
    pub fn signed(&self, name: &str, kind: &str, by: &str, extensions: &str, more: &[&str]) {
        let (request, private) = (format!("{name}.csr"), format!("{name}.key"));
        let subject = format!("/CN={name}");
        let first = [
            "req", "-new", "-nodes", "-keyout", &private, "-out", &request, "-subj", &subject,
        ];
        self.run(first.iter().map(|arg| (*arg).to_owned()).chain(key(kind)));
        self.write(&format!("{name}.ext"), extensions);
        let line = format!(
            "x509 -req -in {name}.csr -CA {by}.crt -CAkey {by}.key -CAcreateserial -out {name}.crt -extfile {name}.ext"
        );
        self.run(line.split(' ').chain(more.iter().copied()));
    }
}

/// Configuration of `openssl ca`, which takes any dates.
const CA: &str = "[ca]\ndefault_ca = d\n[d]\ndatabase = index.txt\nnew_certs_dir = .\nrand_serial = yes\ndefault_md = sha256\n\
                  policy = p\n[p]\ncommonName = supplied\n";

/// A server that shows a certificate and has one file: the manifest `1` of `demo/app`.
pub struct Server {
    child: Child,
    host: String,
    _files: tempfile::TempDir,
}

impl Server {
    /// Starts one on a free port of 127.0.0.1, with `NAME.crt` and `NAME.key`, and more arguments for `openssl s_server`.
    pub fn start(pki: &Pki, name: &str, more: &[&str]) -> Self {
        let files = tempfile::tempdir().unwrap();
        let manifests = files.path().join("v2/demo/app/manifests");
        std::fs::create_dir_all(&manifests).unwrap();
        std::fs::write(manifests.join("1"), "{}").unwrap();
        let absolute = |name: &str| pki.path(name).display().to_string();
        let mut child = Command::new("openssl")
            .args(["s_server", "-accept", "127.0.0.1:0", "-WWW"])
            .args([
                "-cert",
                &absolute(&format!("{name}.crt")),
                "-key",
                &absolute(&format!("{name}.key")),
            ])
            .args(more)
            .current_dir(files.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        let host = loop {
            let mut line = String::new();
            assert!(
                said.read_line(&mut line).unwrap() > 0,
                "openssl s_server does not start"
            );
            if let Some(address) = line.strip_prefix("ACCEPT ") {
                break address.trim().to_owned();
            }
        };
        // Whatever else it says is taken from it.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        Server {
            child,
            host,
            _files: files,
        }
    }

    /// `127.0.0.1:port`.
    pub fn host(&self) -> &str {
        &self.host
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes `hosts.toml` for `host` below `root`, for the registry itself, with these lines.
pub fn write_hosts(root: &Path, host: &str, lines: &str) -> PathBuf {
    let dir = root.join(host);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(
        dir.join("hosts.toml"),
        format!("server = \"https://{host}\"\n{lines}\n"),
    )
    .unwrap();
    dir
}
