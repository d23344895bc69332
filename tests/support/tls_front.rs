//! One port that speaks TLS and plain HTTP, each for another server: the same host may be asked with and without TLS.
//!
//! A connection brings one exchange. Its first byte tells what it is: 22 begins a TLS handshake, and no HTTP request.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::openssl::Pki;

/// The first byte of a TLS handshake.
const HANDSHAKE: u8 = 22;
/// Whoever is silent for so long has gone.
const PATIENCE: Duration = Duration::from_secs(20);

/// A listener that ends with the test's process.
pub struct TlsFront {
    address: SocketAddr,
}

impl TlsFront {
    /// Shows `NAME.crt` to those who speak TLS, and passes what they ask on to `secure`; all others are passed on to `plain`.
    pub fn start(pki: &Pki, name: &str, secure: String, plain: String) -> Self {
        let certificates = CertificateDer::pem_file_iter(pki.path(&format!("{name}.crt"))).unwrap();
        let certificates = certificates.map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(pki.path(&format!("{name}.key"))).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .unwrap();
        let config = Arc::new(config);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, secure, plain) = (Arc::clone(&config), secure.clone(), plain.clone());
                // Who hangs up in the middle ends his own exchange.
                std::thread::spawn(move || serve(stream, &config, &secure, &plain));
            }
        });
        TlsFront { address }
    }

    /// `127.0.0.1:port`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }
}

fn serve(mut stream: TcpStream, config: &Arc<ServerConfig>, secure: &str, plain: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut first = [0];
    if stream.peek(&mut first)? == 0 {
        return Ok(());
    }
    if first[0] != HANDSHAKE {
        return exchange(&mut stream, plain);
    }
    let connection = ServerConnection::new(Arc::clone(config)).map_err(std::io::Error::other)?;
    let mut stream = StreamOwned::new(connection, stream);
    exchange(&mut stream, secure)?;
    stream.conn.send_close_notify();
    stream.flush()
}

/// Passes one request on, and its answer back.
fn exchange(client: &mut (impl Read + Write), server: &str) -> std::io::Result<()> {
    let mut request = Vec::new();
    let head = loop {
        if let Some(at) = request.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            break at + 4;
        }
        if !more(client, &mut request)? {
            return Ok(());
        }
    };
    let text = String::from_utf8_lossy(&request[..head]).into_owned();
    let length = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let is_length = name.eq_ignore_ascii_case("content-length");
        is_length.then(|| value.trim().parse::<usize>().ok()).flatten()
    });
    while request.len() < head + length.unwrap_or(0) {
        if !more(client, &mut request)? {
            return Ok(());
        }
    }
    let mut server = TcpStream::connect(server)?;
    // The answer ends with the connection.
    server.write_all(text.replacen("\r\n", "\r\nconnection: close\r\n", 1).as_bytes())?;
    server.write_all(&request[head..])?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    client.write_all(&answer)?;
    client.flush()
}

fn more(client: &mut impl Read, request: &mut Vec<u8>) -> std::io::Result<bool> {
    let mut piece = [0; 4096];
    let count = client.read(&mut piece)?;
    request.extend_from_slice(&piece[..count]);
    Ok(count > 0)
}
