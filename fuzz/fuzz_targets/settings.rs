//! The reader of settings: each line of an input is an argument. None may name a file,
//! which would be read.

#![no_main]

use groupstate::config::Settings;
use libfuzzer_sys::fuzz_target;

const FILES: [&str; 8] = [
    "--auth-token-file",
    "--redis-ca",
    "--redis-cert",
    "--redis-key",
    "--redis-password-file",
    "--tls-cert",
    "--tls-client-ca",
    "--tls-key",
];
const PASSWORD: &str = "s3cret";

fuzz_target!(|input: &str| {
    let arguments: Vec<&str> = input.lines().collect();
    if arguments
        .iter()
        .any(|argument| FILES.iter().any(|file| argument.starts_with(file)))
    {
        return;
    }
    match Settings::read(std::iter::once("groupstate").chain(arguments.iter().copied())) {
        Ok(settings) => {
            assert!(settings.default_ttl <= settings.max_ttl);
            assert!(settings.max_request_bytes <= settings.max_inflight_bytes);
            assert!((1..=4_096).contains(&settings.max_key_bytes));
            assert!((0.0..=1.0).contains(&settings.otlp_sample_ratio));
            assert!(!settings.key_prefix.contains(char::is_control));
            let endpoint = settings.otlp_endpoint().expect("it was checked");
            assert!(endpoint.is_none_or(|url| !url.contains('@')));
            let redis = settings.redis().expect("it was checked");
            assert!(redis.is_some() || settings.redis_url.is_none_or(|url| url.is_empty()));
        }
        // What one asks for, such as --help.
        Err((_, 0)) => {}
        Err((error, code)) => {
            assert_eq!(code, 2);
            assert!(error.starts_with("error: "), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
            // What stands in the URL and nowhere else is not repeated. (An argument that
            // is unknown is, without its control characters.)
            let mut with_password = arguments
                .iter()
                .filter(|argument| argument.replace(char::is_control, "").contains(PASSWORD));
            if with_password.all(|argument| argument.starts_with("--redis-url=")) {
                assert!(!error.contains(PASSWORD), "{error}");
            }
        }
    }
});
