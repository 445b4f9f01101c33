-- Shared by all scripts: this text stands in front of each of them.
-- Every script touches one key, checks and acts in one step, and returns
-- errors as data, so that they look alike on every version of Redis. A reply
-- is an array {status, now, ...}; `now` is the time of this server in
-- microseconds, from which the client learns its clock. These statuses are
-- common:
--
--   late          now is past the deadline; nothing was done
--   foreign       another type lives at the key
--   whole         {…, document}: its tail does not tell its version; nothing was
--                 done. Call again and tell it
--   unreadable    {…, document}: it has none, since it cannot be read
--   larger        {…, size}: what is stored is too large to come along
--   out_of_range  {…, version}: it is at least 2^53, where numbers are not exact
--   unknown       an earlier attempt may have been executed; nothing was done
--   failed        {…, error}: Redis refused a command

local MAX_ISSUED = '9007199254740992' -- 2^53: 2^53 + 1 is the same number to Lua
local MAX_VERSION = '9223372036854775807' -- 2^63 - 1

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

-- A whole number as text. (%d writes it in half the time of %.0f.)
local function digits(number)
  return string.format('%d', number)
end

local function reply(status, ...)
  return {status, digits(now), ...}
end

-- Compares whole numbers as text: Lua would round what is beyond 2^53.
local function beyond(number, bound)
  if #number ~= #bound then return #number > #bound end
  return number > bound
end

-- What is stored at the key: nil and an error, or a table with
--   exists    whether anything is
--   version   digits; nil when the document is unreadable
--   tail      the end of the document
--   whole     the document, if its tail is not the usual one: somebody has to tell
--             its version
--
-- A value of more than `largest` bytes is not looked at whole: it has no version if
-- its tail tells none. `digest` and `told`: the SHA-1 digest of a document that has
-- to be looked at, and its version, or '' where it is unreadable. There is one reader
-- of JSON, and it is not here: two of them would read some documents differently.
local function look_up(key, largest, digest, told)
  local tail = redis.pcall('GETRANGE', key, -160, -1)
  if type(tail) == 'table' then return nil, tail.err end
  if tail == '' and redis.call('EXISTS', key) == 0 then return {exists = false} end
  local found = {exists = true, tail = tail}
  -- The last brace closes the document, so this is its outer version. (Begun at the
  -- longest one that fits, and not at every byte before it.) With a zero in front it
  -- would be no number of JSON.
  local version = string.match(tail, '},"version":([1-9]%d*)}$', -32)
  if version and not beyond(version, MAX_VERSION) then
    found.version = version
    return found
  end
  if redis.call('STRLEN', key) > largest then return found end
  local document = redis.call('GET', key)
  if digest ~= redis.sha1hex(document) then
    found.whole = document
  elseif told ~= '' then
    found.version = told
  end
  return found
end

-- Whether the call with this write id has written what was found.
local function was_written_by(write_id, found)
  if not found.version then return false end
  local version = '"version":' .. found.version .. '}'
  local tail = '"write_id":"' .. write_id .. '",' .. version .. ',' .. version
  return string.sub(found.tail, -#tail) == tail
end

-- What a refused command comes to. After a lost attempt, which may have been
-- executed before another type came to lie at the key, nothing is sure.
local function refuse(err, lost_since)
  if not string.find(err, 'WRONGTYPE', 1, true) then return reply('failed', err) end
  return reply(lost_since ~= '' and 'unknown' or 'foreign')
end

-- The reply of this status with the document at the key, or how large that is where
-- it has more than `largest` bytes.
local function reply_with_document(status, key, largest, expiry)
  local size = redis.call('STRLEN', key)
  if size > largest then return reply('larger', digits(size)) end
  return reply(status, redis.call('GET', key), expiry)
end

-- The size of a document that is replaced or removed, and its digest unless that
-- would take long.
local function last_trace(key, largest)
  local size = redis.call('STRLEN', key)
  if size > largest then return digits(size) end
  return digits(size), redis.sha1hex(redis.call('GET', key))
end
