//! The values of single settings: how each is written, and which there may be. An error
//! says what to write instead; clap puts the name of the setting before it.

use std::time::Duration;

use bytesize::ByteSize;

const LONGEST_REDIS_TIMEOUT: Duration = Duration::from_secs(60);

pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "write it as 250ms, 5s or 24h".to_owned())
}

pub fn redis_timeout(text: &str) -> Result<Duration, String> {
    let timeout = duration(text)?;
    if !(Duration::from_millis(1)..=LONGEST_REDIS_TIMEOUT).contains(&timeout) {
        return Err("must be from 1ms to 1m".into());
    }
    Ok(timeout)
}

pub fn trip_after(text: &str) -> Result<Duration, String> {
    let trip_after = duration(text)?;
    if !(Duration::from_millis(50)..=Duration::from_secs(60)).contains(&trip_after) {
        return Err("must be from 50ms to 1m".into());
    }
    Ok(trip_after)
}

pub fn connection_age(text: &str) -> Result<Duration, String> {
    let age = duration(text)?;
    if !(Duration::from_secs(1)..=Duration::from_secs(365 * 24 * 3_600)).contains(&age) {
        return Err("must be from 1s to 365d".into());
    }
    Ok(age)
}

pub fn age_grace(text: &str) -> Result<Duration, String> {
    let grace = duration(text)?;
    if !(Duration::from_secs(1)..=Duration::from_secs(3_600)).contains(&grace) {
        return Err("must be from 1s to 1h".into());
    }
    Ok(grace)
}

pub fn reload_interval(text: &str) -> Result<Duration, String> {
    let interval = duration(text)?;
    if !(Duration::from_millis(100)..=Duration::from_secs(3_600)).contains(&interval) {
        return Err("must be from 100ms to 1h".into());
    }
    Ok(interval)
}

/// What a semaphore can count.
pub fn inflight_size(text: &str) -> Result<usize, String> {
    let bytes = size(text)?;
    if bytes > tokio::sync::Semaphore::MAX_PERMITS {
        return Err("is too large".into());
    }
    Ok(bytes)
}

pub fn size(text: &str) -> Result<usize, String> {
    let size: ByteSize = text
        .parse()
        .map_err(|_| "write it as 4096, 64KiB or 256MiB".to_owned())?;
    let bytes = usize::try_from(size.as_u64()).map_err(|_| "is too large".to_owned())?;
    if bytes == 0 {
        return Err("must not be 0".into());
    }
    Ok(bytes)
}

pub fn key_size(text: &str) -> Result<usize, String> {
    let bytes = size(text)?;
    if bytes > 4_096 {
        return Err("must be at most 4096".into());
    }
    Ok(bytes)
}

pub fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must not be 0".into()),
        // The most that a semaphore takes.
        Ok(count) if count <= u32::MAX as usize => Ok(count),
        _ => Err("must be a whole number".into()),
    }
}

pub fn ratio(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        _ => Err("must be from 0 to 1".into()),
    }
}

pub fn key_prefix(text: &str) -> Result<String, String> {
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err("must not be empty or hold control characters".into());
    }
    Ok(text.to_owned())
}
